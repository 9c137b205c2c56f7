"""PrefixBloom: transformers' Bloom with named prefixes, of which each row of a batch can use its own.

A prefix is used through the cache: it is put into past_key_values before the text, as if it were text that was read earlier.
transformers' `generate` knows the text alone; `prepare_inputs_for_generation` adds the prefix's part of the attention mask.

Shapes: L layers, R rows of a batch, H heads, P tokens of a prefix (in a mask, of the longest), T tokens of text, D head_dim.
"""

import copy
import functools
import inspect
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StaticCache,
)

from prefix_tuning.base_model.identity import check_base, fingerprint
from prefix_tuning.base_model.sharding import equal_passes, is_sharded
from prefix_tuning.base_model.special_tokens import add_end, align_special_tokens, recorded_end
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ENCODER_FILE
from prefix_tuning.files.prefixes import SavedPrefix, save_prefix
from prefix_tuning.generation.cache import CACHE, PrefixedCache, has_prefixes, is_supported, set_prefix_mask
from prefix_tuning.generation.options import check_options, copies_of_a_row, guess_mask, new_tokens, resolve_options
from prefix_tuning.model.bloom import Bloom, add_packed_forward, empty_prefix, prefix_cache

BASE = "base"  # the name for no prefix
_BY_POSITION = list(inspect.signature(BloomForCausalLM.generate).parameters)[3:-1]  # after generation_config
Names = str | list[str] | None  # of prefixes: one for all rows, or one for each; None: that of the prefix in use

_NO_CHECKPOINTING = (
    "gradient checkpointing drops past_key_values while a model trains, and the prefix with them: call model.eval(), or "
    "turn it off"
)


class _PrefixBloomConfig(BloomConfig):
    model_type = "prefix-bloom"


class PrefixBloom(Bloom):
    """A Bloom with any number of prefixes.

        model = PrefixBloom(base)                                # a BloomForCausalLM, all of it on one device
        model.attach("short", load_prefix("./chatbot"))
        model.generate(**inputs)                                 # with the prefix in use: the first one attached
        model.generate(**inputs, prefix_name=["short", "base"])  # by row; "base" is the frozen base alone
        model.use("base")
        model.detach("short")
        model.save_pretrained("./prefixes")                      # each prefix into a folder of its name

    It is a BloomForCausalLM itself, made of new modules around the tensors of `base`, so transformers' pipeline takes it.
    Nothing above changes `base`; but the weights are in memory once, so whoever changes them changes them for both. (A base
    that is sharded over processes cannot be copied: its modules and its config are shared.)
    """

    config_class = _PrefixBloomConfig

    def __init__(self, base: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None):
        """tokenizer: if given, its EOS ends answers too, and prefixes that were trained with another one are refused."""
        if not isinstance(base, BloomForCausalLM):
            raise TypeError(f"PrefixBloom takes a loaded BloomForCausalLM, not {type(base).__name__}")
        if len({tensor.device for tensor in base.parameters()} | {base.device}) > 1 or base.device.type == "meta":
            raise ValueError("PrefixBloom takes a base that is whole on one device")
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        own = vars(base if is_sharded(base) else copy.deepcopy(base, shared))
        # accelerate and PEFT set methods on the instance, which would hide those of this class. With FSDP's mark, `generate`
        # would keep processes in step by itself; here `equal_passes` does.
        left_out = ("forward", "_old_forward", "_hf_hook", "prepare_inputs_for_generation", "_is_fsdp_managed_module")
        vars(self).update({name: value for name, value in own.items() if name not in left_out})
        # A prefix needs a cache, whose kind `generate` chooses below.
        self.config.use_cache = self.generation_config.use_cache = True
        self.generation_config.cache_implementation = None
        self.prefixes: dict[str, torch.Tensor] = {}  # each in the precision that it was given in
        self.trained_on: dict[str, dict[str, Any]] = {}  # what each one's files record of its base
        self.active = BASE
        self.base_fingerprint = fingerprint(base, tokenizer)
        if tokenizer is not None:
            align_special_tokens(self.generation_config, tokenizer, base.name_or_path or "the base")
        add_packed_forward(self)
        for block in self.transformer.h:
            block.set_submodule("mlp.gelu_impl", nn.GELU(approximate="tanh"))  # Bloom's GELU in one kernel instead of eight
        self.lm_head.register_forward_pre_hook(_as_contiguous)

    @property
    def names(self) -> list[str]:
        """The names that `prefix_name` may have: "base", and those of the prefixes."""
        return [BASE, *self.prefixes]

    def attach(self, name: str, prefix: SavedPrefix | torch.Tensor, force: bool = False) -> None:
        """Adds a prefix under a name, or replaces the one of that name. The first one attached is in use at once. The EOS of
        the tokenizer that it was trained with, where its file records one, ends answers from now on.

        prefix: what `load_prefix` returns, or a tensor (L, 2, H, P, D). force: accept one whose base had other weights or
        another tokenizer. Raises UserError if it does not fit the base, TypeError or ValueError if it is no prefix.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a prefix is a str, not {type(name).__name__}")
        if name == BASE:
            raise ValueError(f"{BASE!r} is the name of the base without a prefix")
        if not isinstance(prefix, (torch.Tensor, SavedPrefix)):
            raise TypeError(f"a prefix is what load_prefix returns, or a tensor, not {type(prefix).__name__}")
        tensor, trained_on = (prefix, self.base_fingerprint) if isinstance(prefix, torch.Tensor) else prefix
        if tensor.dim() != 5 or tensor.shape[1] != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError("a prefix is (layers, 2, heads, tokens, head_dim), of a float type and finite")
        check_base(tensor.shape, trained_on, self.base_fingerprint, name, force)
        if (end := recorded_end(trained_on)) is not None and 0 <= end < self.config.vocab_size:
            add_end(self.generation_config, end, f"{name}: the tokenizer of its training")
        if not self.prefixes:
            self.active = name
        self.prefixes[name] = tensor.detach().to(self.device, copy=True)  # a caller may go on training its own
        self.trained_on[name] = trained_on

    def detach(self, name: str) -> None:
        """Removes a prefix. If it was in use, the base answers alone from now on. Raises ValueError for unknown names."""
        if name not in self.prefixes:
            raise ValueError(f"no prefix {name!r}; there are {', '.join(self.prefixes) or 'none'}")
        del self.prefixes[name], self.trained_on[name]
        if self.active == name:
            self.active = BASE

    def use(self, name: str) -> None:
        """Sets the prefix of calls that name none; "base": no prefix. Raises ValueError for unknown names."""
        (self.active,) = self.names_of([name], 1)

    def save_pretrained(  # type: ignore[override]  # transformers' other options are about the weights of a base
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *_: Any, push_to_hub: bool = False, **__: Any
    ) -> None:
        """Writes each prefix as PEFT writes its adapters, into a folder of its name within `save_directory`.

        `load_prefix` and PeftModel.from_pretrained read such a folder. The base is not written: it did not change. Raises
        ValueError if there are no prefixes, or if a name cannot name a folder; UserError where a folder holds the encoder of
        a training run, which belongs to the prefix that would be replaced.
        """
        if push_to_hub:
            self.push_to_hub()
        if not self.prefixes:
            raise ValueError("there are no prefixes to save; the base is saved by its own save_pretrained")
        if not is_main_process:
            return
        folders = {name: Path(save_directory, name) for name in self.prefixes}
        for name, folder in folders.items():
            if name in ("", "..") or Path(name).name != name:
                raise ValueError(f"the prefix {name!r} cannot be saved: no folder can have that name")
            if (folder / ENCODER_FILE).exists():
                raise UserError(f"{folder}: holds the prefix of a training run; name another folder")
        for name, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            save_prefix(folder, SavedPrefix(self.prefixes[name], self.trained_on[name]))

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        """Refused: on the hub, each prefix is a repository of its own."""
        raise ValueError(
            "a PrefixBloom is not pushed as a whole: model.save_pretrained(FOLDER), then `hf upload USER/REPOSITORY "
            "FOLDER/PREFIX` for each prefix; load_prefix takes USER/REPOSITORY"
        )

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Refused: a base is loaded first, then made a PrefixBloom."""
        raise ValueError(
            "a PrefixBloom is made of a loaded base: model = PrefixBloom(BloomForCausalLM.from_pretrained(BASE)), then "
            "model.attach(NAME, load_prefix(FOLDER)) for each prefix"
        )

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, and with it `generate_batch`: a prefix cannot be put into the paged cache."""
        raise ValueError("continuous batching (generate_batch) does not go with a prefix; `generate` takes many rows")

    def names_of(self, prefix_name: Names, rows: int) -> list[str]:
        """The name of each row's prefix. Raises ValueError for unknown names, and if there are not as many as rows."""
        prefix_name = self.active if prefix_name is None else prefix_name
        names = [prefix_name] if isinstance(prefix_name, str) else prefix_name
        for name in names:
            if name not in self.names:
                raise ValueError(f"no prefix {name!r}; there are {', '.join(self.names)}")
        if isinstance(prefix_name, str):
            return names * rows
        if len(names) != rows:
            raise ValueError(f"{len(names)} prefixes are named for {rows} rows")
        return names

    def _prefixes_of(self, prefix_name: Names, rows: int) -> list[torch.Tensor]:
        """The prefix of each row, (L, 2, H, P, D); the base's has no tokens."""
        none = empty_prefix(self.config)
        return [self.prefixes.get(name, none).to(self.device, self.dtype) for name in self.names_of(prefix_name, rows)]

    def prepend(
        self, attention_mask: torch.Tensor, prefix_name: Names = None, copies: int = 1, cache: Any = None
    ) -> tuple[torch.Tensor, Cache]:
        """The mask of prefix and text, (R, P + T), int64, and the prefixes as past_key_values.

        attention_mask: of the text, (R, T). copies: how often `generate` will repeat each row, as beams or sequences; the
        past_key_values are repeated already. cache: an empty one to fill; None: a new DynamicCache.
        """
        prefixes = self._prefixes_of(prefix_name, len(attention_mask))
        cache, mask = prefix_cache([tensor for tensor in prefixes for _ in range(copies)], cache)
        set_prefix_mask(cache, mask)  # (R * copies, P), for calls that continue from this cache
        return torch.cat((mask[::copies], attention_mask), dim=1), cache

    def _lacks_prefix(self, cache: Cache | None, prefix_name: Names, rows: int) -> bool:
        """Whether past_key_values are empty, so that the prefixes have to be put into them.

        Raises ValueError if they hold text without a prefix although these rows have one, or if they hold prefixes and
        prefix_name names others.
        """
        if cache is None:
            return True
        if not is_supported(cache):
            raise ValueError(f"past_key_values must be a DynamicCache or a StaticCache, not {type(cache).__name__}")
        if has_prefixes(cache):
            if prefix_name is not None:
                raise ValueError("past_key_values hold a prefix already; leave out prefix_name")
            return False
        if cache.get_seq_length() == 0:
            return True
        if set(self.names_of(prefix_name, rows)) != {BASE}:
            raise ValueError(
                f"past_key_values hold text but no prefix: begin with an empty cache, or name {BASE!r}; a prefix that PEFT "
                "puts there is attached instead, by load_prefix"
            )
        return False

    def equal_passes(self) -> AbstractContextManager[None]:
        """`sharding.equal_passes` around generation, in which each process makes as many passes as its answers need."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return equal_passes(self, torch.no_grad()(lambda: self(token)))

    @functools.wraps(BloomForCausalLM.forward)  # transformers reads from the signature what a model accepts
    def forward(  # type: ignore[override]  # functools types what it wraps as an object, not as a method
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        *,
        cache=None,
        prefix_name=None,
        **options,
    ):
        """transformers' forward, with a prefix for each row (`Names`).

        Empty past_key_values get the prefix. Those that begin with one are continued; those that hold text alone are for
        the base, and a ValueError for a prefix. `cache` is another name for past_key_values, as in transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        text = input_ids if inputs_embeds is None else inputs_embeds
        if text is not None:
            if self._lacks_prefix(cache, prefix_name, len(text)):
                if attention_mask is None:
                    attention_mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
                attention_mask, cache = self.prepend(attention_mask, prefix_name, cache=cache)
            elif has_prefixes(cache):
                attention_mask = self._whole_mask(attention_mask, text, cache)
            if self.training and self.transformer.gradient_checkpointing and cache.get_seq_length() > 0:
                raise ValueError(_NO_CHECKPOINTING)
            # For a StaticCache, Bloom needs a mask of its length.
            if attention_mask is not None and (more := cache.get_max_length(0) - attention_mask.shape[-1]) > 0:
                attention_mask = F.pad(attention_mask, (0, more))
        return super().forward(input_ids, cache, attention_mask, inputs_embeds, **options)

    @staticmethod
    def _whole_mask(mask: torch.Tensor | None, text: torch.Tensor, cache: PrefixedCache) -> torch.Tensor:
        """The mask of prefix and text for a forward pass that continues from a cache: (R, P + T).

        mask: that, or one of the text alone, (R, T), as transformers' users write it, or None. T: cached tokens included.
        """
        prefix_mask = cache.prefix_mask
        if mask is not None and mask.shape[1] == cache.get_max_length(0):
            return mask  # as `generate` writes it for a StaticCache, whose length a compiled forward cannot ask for
        tokens = cache.get_seq_length() + text.shape[1] - prefix_mask.shape[1]
        if mask is None:
            mask = torch.ones(len(text), tokens, dtype=torch.long, device=text.device)
        return torch.cat((prefix_mask, mask), dim=1) if mask.shape[1] == tokens else mask

    @torch.no_grad()
    def generate(  # type: ignore[override]  # what transformers' own names
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *more,
        prefix_name: Names = None,
        **options,
    ):
        """transformers' `generate`, with a prefix for each row (`Names`).

        inputs (or input_ids): (R, T), padded on the left; left out, a text begins with BOS, as in transformers.
        cache_implementation="static" is compiled where transformers compiles it. past_key_values: an empty cache gets the
        prefix; with those of an earlier call, and the whole text so far, generation continues after the prefix of that call.
        Lengths, stopping criteria and streamers see the text alone. Raises ValueError for what does not work with a prefix:
        other kinds of cache or none, inputs_embeds, assisted generation, guidance_scale, prefill_chunk_size, gradient
        checkpointing in train mode, one of PEFT's prompts around this model.
        """
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:  # PEFT's, which fills the cache itself
            raise ValueError("PEFT's prompts do not go around a PrefixBloom: attach the adapter to it, by load_prefix")
        if self.training and self.transformer.gradient_checkpointing:
            raise ValueError(_NO_CHECKPOINTING)
        if len(more) > len(_BY_POSITION):
            raise TypeError(f"generate takes {2 + len(_BY_POSITION)} arguments by position, not {2 + len(more)}")
        options |= zip(_BY_POSITION, more, strict=False)
        input_ids = options.pop("input_ids", inputs)
        settings, options = resolve_options(self.generation_config, generation_config, options)
        check_options(settings, options)
        if input_ids is None:
            if settings.bos_token_id is None:
                raise ValueError("input_ids are missing, and there is no bos_token_id to begin with")
            rows = 1 if prefix_name is None or isinstance(prefix_name, str) else len(prefix_name)
            input_ids = torch.full((rows, 1), settings.bos_token_id, device=self.device)
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids are empty: leave them out, and the text begins with BOS")
        mask = options.pop("attention_mask", None)
        if mask is None:
            mask = guess_mask(input_ids, settings)
        past_key_values = options.pop("past_key_values", None)
        cache = options.pop("cache", past_key_values)
        if lacks_prefix := self._lacks_prefix(cache, prefix_name, len(input_ids)):
            if mask.shape != input_ids.shape:
                raise ValueError(f"attention_mask is {tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}")
            cache = self._start_cache(cache, settings, mask, prefix_name)
        # With new ids alone, as transformers also takes them, the mask is that of the whole cache and has the prefix's part.
        if lacks_prefix or mask.shape[1] == input_ids.shape[1]:
            copies = copies_of_a_row(settings)
            if not has_prefixes(cache):
                set_prefix_mask(cache, mask[:, :0].repeat_interleave(copies, dim=0))
            prefix_mask = cache.prefix_mask
            if len(prefix_mask) != copies * len(mask):
                raise ValueError(f"past_key_values have {len(prefix_mask)} rows, but {copies * len(mask)} are continued")
            new = prefix_mask.shape[1] + mask.shape[1] - cache.get_seq_length()
            if not 0 < new <= input_ids.shape[1]:
                raise ValueError("input_ids must be the whole text so far, and longer than what past_key_values hold of it")
            options["prefix_mask"] = prefix_mask[::copies]  # `generate` repeats it like the rows
        # mypy: transformers declares a type of self here that its own models do not have.
        return super().generate(input_ids, settings, attention_mask=mask, **{CACHE: cache}, **options)  # type: ignore[misc]

    def _start_cache(self, cache: Cache | None, settings: GenerationConfig, mask: torch.Tensor, prefix_name: Names) -> Cache:
        """The empty cache, or a new one of the kind that `settings` name, with the prefixes in it and room for the answers.

        mask: of the text, (R, T). Raises ValueError if the cache is too small.
        """
        longest = max(prefix.shape[3] for prefix in self._prefixes_of(prefix_name, len(mask)))
        length = longest + mask.shape[1] + new_tokens(settings, mask.shape[1])
        if cache is None:
            static = settings.cache_implementation == "static"
            cache, settings.cache_implementation = StaticCache(self.config, length) if static else DynamicCache(), None
        elif -1 < (room := cache.get_max_length(layer_idx=0)) < length - 1:  # the last token is never put into it
            raise ValueError(f"past_key_values have room for {room} tokens; prefix, text and answer need {length - 1}")
        return self.prepend(mask, prefix_name, copies_of_a_row(settings), cache)[1]

    # mypy: transformers passes all but input_ids by keyword.
    def prepare_inputs_for_generation(self, input_ids, *, attention_mask=None, prefix_mask=None, **kwargs):  # type: ignore[override]
        """The inputs of one forward pass of `generate`: its mask of the text, with the prefix's part in front.

        prefix_mask: that part, (R, P); None: attention_mask has it already.
        """
        if prefix_mask is not None:
            if attention_mask is None:  # transformers drops a mask of ones
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat((prefix_mask, attention_mask), dim=1)
            if kwargs.get("is_first_iteration"):  # transformers would subtract the cache, prefix included, from the text
                kwargs["next_sequence_length"] = attention_mask.shape[1] - int(kwargs[CACHE].get_seq_length())
        # mypy: as in `generate`.
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]


def _as_contiguous(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A hook in front of the head, for the slice of positions whose logits `generate` wants.

    Unless that is contiguous, F.linear copies the head's weights for each row (bfloat16), or reads them again (float32).
    """
    return (inputs[0].contiguous(),)


# Else a pipeline logs that it does not know this class. Configurations of models remain those of the base.
AutoModelForCausalLM.register(_PrefixBloomConfig, PrefixBloom)
