"""PrefixBloom: a causal language model of transformers with named prefixes, a different one for each row of a batch.

The name is older than its support for other families than Bloom (model/decoder.py).

A prefix goes into past_key_values, in the dtype of the base, as if it were text that the model has already read.
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
    BloomForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
)

from prefix_tuning.base_model.identity import check_base, fingerprint, recorded_end
from prefix_tuning.base_model.loading import add_end, align_special_tokens
from prefix_tuning.base_model.sharding import equal_passes, is_sharded
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ENCODER_FILE
from prefix_tuning.files.prefixes import SavedPrefix, save_prefix
from prefix_tuning.generation.cache import CACHE, PrefixedCache, has_prefixes, is_supported, set_prefix_mask
from prefix_tuning.generation.options import check_options, copies_of_a_row, guess_mask, new_tokens, resolve_options
from prefix_tuning.model.bloom import Bloom, PackedModel, add_packed_forward, empty_prefix, prefix_cache
from prefix_tuning.model.decoder import FAMILIES, Decoder, decoder_class, sliding_window

BASE = "base"  # the name of the base without a prefix
# Names of prefixes: one for all rows, or one for each; None: the prefix in use.
Names = str | list[str] | None

# The arguments of transformers' `generate` that may follow generation_config by position.
_BY_POSITION = list(inspect.signature(BloomForCausalLM.generate).parameters)[3:-1]
_NO_CHECKPOINTING = (
    "gradient checkpointing drops past_key_values while a model trains, and the prefix with them: call model.eval(), or "
    "turn it off"
)


class _PrefixBloomConfig(PreTrainedConfig):
    model_type = "prefix-bloom"


class PrefixBloom(PackedModel):
    """A base with any number of prefixes.

        model = PrefixBloom(base)                                # a BloomForCausalLM, LlamaForCausalLM, ... on one device
        model.attach("short", load_prefix("./chatbot"))
        model.generate(**inputs)                                 # with the prefix in use: the first one attached
        model.generate(**inputs, prefix_name=["short", "base"])  # one name per row; "base" is the frozen base alone
        model.use("base")
        model.detach("short")
        model.save_pretrained("./prefixes")                      # each prefix into a folder of its name

    It is of the base's class too, and made of new modules around the tensors of `base`, so transformers' pipeline takes it.
    Nothing above changes `base`. But both share the weights, so a change of them is a change for both. (A base that is
    sharded over processes cannot be copied: its modules and its config are shared too.)
    """

    config_class = _PrefixBloomConfig
    _takes_positions: bool  # whether the base's forward takes position_ids; Bloom's does not
    _made_of: tuple[type, type]  # the arguments of `_combined`

    def __new__(cls, base: Any, *_: Any, **__: Any):
        return object.__new__(_class_for(cls, base))

    def __reduce__(self):
        # pickle and copy.deepcopy cannot find a class by its name if it was made at run time.
        return _empty, type(self)._made_of, vars(self)

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        """tokenizer: if given, its EOS ends answers too, and prefixes that were trained with another tokenizer are refused.

        Raises TypeError for a base that is no loaded model of a family that model/ knows, such as BloomForCausalLM, and
        ValueError for one that is not whole on one device.
        """
        if len({tensor.device for tensor in base.parameters()} | {base.device}) > 1 or base.device.type == "meta":
            raise ValueError("PrefixBloom takes a base that is whole on one device")
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        own = vars(base if is_sharded(base) else copy.deepcopy(base, shared))
        # accelerate and PEFT set methods on the instance, which would hide the methods of this class. FSDP's flag is dropped
        # because `equal_passes` keeps processes in step, where `generate` would do it a second time.
        left_out = ("forward", "_old_forward", "_hf_hook", "prepare_inputs_for_generation", "_is_fsdp_managed_module")
        vars(self).update({name: value for name, value in own.items() if name not in left_out})
        # A prefix needs a cache. `generate` below chooses its kind.
        self.config.use_cache = self.generation_config.use_cache = True
        self.generation_config.cache_implementation = None
        self.prefixes: dict[str, torch.Tensor] = {}  # in the dtypes in which they were attached
        self.trained_on: dict[str, dict[str, Any]] = {}  # for each prefix, the record of its base in its files
        self.active = BASE
        self.base_fingerprint = fingerprint(base, tokenizer)
        if tokenizer is not None:
            align_special_tokens(self.generation_config, tokenizer, base.name_or_path or "the base")
        if isinstance(self, Bloom):
            add_packed_forward(self)
            for block in self.transformer.h:
                block.set_submodule("mlp.gelu_impl", nn.GELU(approximate="tanh"))  # as in PackedBlock, one kernel
        self.get_output_embeddings().register_forward_pre_hook(_as_contiguous)

    @property
    def names(self) -> list[str]:
        """The names that `prefix_name` takes: "base", and the names of the prefixes."""
        return [BASE, *self.prefixes]

    def attach(self, name: str, prefix: SavedPrefix | torch.Tensor, force: bool = False) -> None:
        """Adds a prefix under a name, or replaces the prefix of that name. The first one attached is in use at once.

        If its file records the EOS of the tokenizer that it was trained with, that ends answers from now on. prefix: the
        result of `load_prefix`, or a tensor (L, 2, H, P, D). force: accept a prefix whose base had other weights or another
        tokenizer. Raises UserError if it does not fit the base, TypeError or ValueError if it is no prefix.
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
        self.prefixes[name] = tensor.detach().to(self.device, copy=True)  # the caller may go on training the tensor
        self.trained_on[name] = trained_on

    def detach(self, name: str) -> None:
        """Removes a prefix. If it was in use, the base answers alone from then on. Raises ValueError for an unknown name."""
        if name not in self.prefixes:
            raise ValueError(f"no prefix {name!r}; there are {', '.join(self.prefixes) or 'none'}")
        del self.prefixes[name], self.trained_on[name]
        if self.active == name:
            self.active = BASE

    def use(self, name: str) -> None:
        """Sets the prefix for calls that name none; "base": no prefix. Raises ValueError for an unknown name."""
        (self.active,) = self.names_of([name], 1)

    def save_pretrained(  # type: ignore[override]  # transformers' other options are about the weights of a base
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *_: Any, push_to_hub: bool = False, **__: Any
    ) -> None:
        """Writes each prefix as PEFT writes its adapters, into a folder of its name within `save_directory`.

        `load_prefix` and PeftModel.from_pretrained read such a folder. The base is not written: it did not change. Raises
        ValueError if there is no prefix, or if a name cannot name a folder. Raises UserError if a folder holds the encoder
        of a training run, which belongs to the prefix that would be replaced.
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
        """Refused: load a base first, then make a PrefixBloom of it."""
        raise ValueError(
            "a PrefixBloom is made of a loaded base: model = PrefixBloom(AutoModelForCausalLM.from_pretrained(BASE)), then "
            "model.attach(NAME, load_prefix(FOLDER)) for each prefix"
        )

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, and with it `generate_batch`: a prefix cannot be put into the paged cache."""
        raise ValueError("continuous batching (generate_batch) does not go with a prefix; `generate` takes many rows")

    def names_of(self, prefix_name: Names, rows: int) -> list[str]:
        """The name of each row's prefix. Raises ValueError for an unknown name, or for another number of names than rows."""
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
        """The prefix of each row, (L, 2, H, P, D), in the dtype of the base."""
        none = empty_prefix(self.config)
        return [self.prefixes.get(name, none).to(self.device, self.dtype) for name in self.names_of(prefix_name, rows)]

    def prepend(
        self, attention_mask: torch.Tensor, prefix_name: Names = None, copies: int = 1, cache: Any = None
    ) -> tuple[torch.Tensor, Cache]:
        """The mask of prefix and text, (R, P + T), int64, and a cache that holds the prefixes, (R * copies) rows.

        attention_mask: of the text, (R, T). copies: how often `generate` will repeat each row, for beams or for several
        sequences. cache: an empty one to fill; None: a new DynamicCache.
        """
        prefixes = self._prefixes_of(prefix_name, len(attention_mask))
        cache, mask = prefix_cache([tensor for tensor in prefixes for _ in range(copies)], cache)
        set_prefix_mask(cache, mask)  # for calls that continue from this cache
        return torch.cat((mask[::copies], attention_mask), dim=1), cache

    def _lacks_prefix(self, cache: Cache | None, prefix_name: Names, rows: int) -> bool:
        """Whether past_key_values are empty, so that the prefixes have to be put into them.

        Raises ValueError if they hold text without a prefix although these rows have one, or if they hold prefixes and there
        is a prefix_name.
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
        """`sharding.equal_passes` for generation, where each process runs as many passes as its answers need."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return equal_passes(self, torch.no_grad()(lambda: self(token)))

    def forward(
        self,
        *,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values=None,
        cache=None,
        prefix_name=None,
        **options,
    ):
        """transformers' forward, with a prefix for each row. prefix_name: `Names`.

        Empty past_key_values get the prefix. If they begin with one, they are continued. If they hold text alone, they are
        for the base, and a prefix raises ValueError. `cache` is another name for past_key_values, as in transformers 5.24.
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
            if self.training and self._checkpoints_layers() and cache.get_seq_length() > 0:
                raise ValueError(_NO_CHECKPOINTING)
            if attention_mask is not None and not _is_whole(attention_mask):
                if has_prefixes(cache) and (prefix_length := cache.prefix_mask.shape[1]):
                    self._check_window(attention_mask[:, prefix_length:], attention_mask.shape[1])
                if self._takes_positions and position_ids is None:
                    position_ids = _positions_of(attention_mask)[:, -text.shape[1] :]
                # For a StaticCache, Bloom needs a mask as long as the cache.
                if (more := cache.get_max_length(0) - attention_mask.shape[-1]) > 0:
                    attention_mask = F.pad(attention_mask, (0, more))
        if position_ids is not None:
            options["position_ids"] = position_ids
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, CACHE: cache}
        return super().forward(**given, **options)  # type: ignore[misc]  # the base's class follows in the MRO

    def _checkpoints_layers(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @staticmethod
    def _whole_mask(mask: torch.Tensor | None, text: torch.Tensor, cache: PrefixedCache) -> torch.Tensor:
        """The mask of prefix and text for a forward pass that continues from a cache: (R, P + T).

        mask: the same, or a mask of the text alone, (R, T), as transformers' users write it, or None. T: with cached tokens.
        """
        prefix_mask = cache.prefix_mask
        # `generate` writes such a mask for a StaticCache. A compiled forward cannot ask such a cache for its length.
        if mask is not None and (_is_whole(mask) or mask.shape[1] == cache.get_max_length(0)):
            return mask
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
        """transformers' `generate`, with a prefix for each row. prefix_name: `Names`.

        inputs (or input_ids): (R, T), padded on the left; without them, a text begins with BOS, as in transformers.
        cache_implementation="static" is compiled where transformers compiles it. past_key_values: an empty cache gets the
        prefix; with the cache of an earlier call, and the whole text so far, generation continues after the prefix of that
        call. Lengths, stopping criteria and streamers see the text alone. Raises ValueError for what does not work with a
        prefix: other kinds of cache or none, inputs_embeds, assisted generation, guidance_scale, prefill_chunk_size,
        gradient checkpointing in train mode, one of PEFT's prompts around this model.
        """
        # PEFT's prompts replace this method with one that fills the cache itself.
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:
            raise ValueError("PEFT's prompts do not go around a PrefixBloom: attach the adapter to it, by load_prefix")
        if self.training and self._checkpoints_layers():
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
        # transformers also takes new ids alone, with a mask of the whole cache: then the mask has the prefix's part already.
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

    def length_of(self, prefix_name: Names, rows: int, tokens: int, settings: GenerationConfig) -> int:
        """The largest number of tokens of prefix, text and answer in a batch of `rows` texts, padded to `tokens` tokens."""
        longest = max(prefix.shape[3] for prefix in self._prefixes_of(prefix_name, rows))
        return longest + tokens + new_tokens(settings, tokens)

    def outgrows_window(self, length: int) -> bool:
        """Whether layers with a sliding window do not see all of `length` tokens. They count padding between prefix and text
        too, so an answer would depend on the rows beside its own.
        """
        window = sliding_window(self.config)
        return window is not None and length > window

    def _check_window(self, mask: torch.Tensor, length: int) -> None:
        """Raises ValueError for padding in the text, mask (R, T), where `length` tokens in all outgrow a sliding window."""
        if self.outgrows_window(length) and not mask.all():
            size = sliding_window(self.config)
            raise ValueError(f"prefix, text and answer outgrow the model's window of {size} tokens: ask rows of one length")

    def _start_cache(self, cache: Cache | None, settings: GenerationConfig, mask: torch.Tensor, prefix_name: Names) -> Cache:
        """The empty cache, or a new one of the kind that `settings` names, with the prefixes in it and room for the answers.

        mask: of the text, (R, T). Raises ValueError if the cache is too small, and for padding that takes up a window.
        """
        length = self.length_of(prefix_name, len(mask), mask.shape[1], settings)
        self._check_window(mask, length)
        if cache is None:
            static = settings.cache_implementation == "static"
            cache, settings.cache_implementation = StaticCache(self.config, length) if static else DynamicCache(), None
        # The last token of an answer never goes into the cache.
        elif -1 < (room := cache.get_max_length(layer_idx=0)) < length - 1:
            raise ValueError(f"past_key_values have room for {room} tokens; prefix, text and answer need {length - 1}")
        return self.prepend(mask, prefix_name, copies_of_a_row(settings), cache)[1]

    # mypy: transformers passes all but input_ids by keyword.
    def prepare_inputs_for_generation(self, input_ids, *, attention_mask=None, prefix_mask=None, **kwargs):  # type: ignore[override]
        """The inputs of one forward pass of `generate`, with the prefix's part of the mask in front of the text's.

        prefix_mask: (R, P); None: attention_mask has the prefix's part already.
        """
        if prefix_mask is not None:
            if attention_mask is None:  # transformers drops a mask of ones
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat((prefix_mask, attention_mask), dim=1)
            # transformers would subtract the length of the cache, which counts the prefix, from the length of the text.
            if kwargs.get("is_first_iteration"):
                kwargs["next_sequence_length"] = attention_mask.shape[1] - int(kwargs[CACHE].get_seq_length())
            # transformers' own count the text's tokens alone.
            if self._takes_positions:
                kwargs["position_ids"] = _positions_of(attention_mask)
        # mypy: as in `generate`.
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]


def _class_for(cls: type, base: Any) -> type:
    """PrefixBloom, or its subclass `cls`, and the class of a base in one. Raises TypeError for what is no known base."""
    if isinstance(base, PrefixBloom):
        return type(base)
    if isinstance(base, BloomForCausalLM):
        return _combined(cls, Bloom)
    if not isinstance(base, PreTrainedModel) or base.config.model_type not in FAMILIES or not base.can_generate():
        raise TypeError(f"PrefixBloom takes a loaded BloomForCausalLM, LlamaForCausalLM, ..., not {type(base).__name__}")
    family: Any = base.family if isinstance(base, Decoder) else type(base)
    return _combined(cls, family)


@functools.cache
def _combined(cls: type, family: Any) -> type:
    """The class of a PrefixBloom whose base is a Bloom, or of a `family` of transformers that model/decoder.py knows."""
    packed = family if family is Bloom else decoder_class(family)
    names = list(inspect.signature(family.forward).parameters)[1:]

    @functools.wraps(family.forward)  # transformers reads from the signature what a model accepts
    def forward(self, *inputs, **options):
        return cls.forward(self, **dict(zip(names, inputs, strict=False)), **options)  # type: ignore[attr-defined]

    own = {"forward": forward, "_takes_positions": "position_ids" in names, "_made_of": (cls, family)}
    return type(cls.__name__, (cls, packed), own)


def _empty(cls: type, family: type) -> PrefixBloom:
    return object.__new__(_combined(cls, family))


def _is_whole(mask: Any) -> bool:
    """Whether `generate` has spelled out a mask for each query and key, as it does for a StaticCache; one for each kind of
    layer in a family with sliding windows.
    """
    return isinstance(mask, dict) or mask.dim() == 4


def _positions_of(mask: torch.Tensor) -> torch.Tensor:
    """The position of each token by a mask (R, P + T): how many real ones stand in front of it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _as_contiguous(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A hook in front of the head: makes the slice of positions contiguous whose logits `generate` wants.

    Otherwise F.linear copies the head's weights for each row (bfloat16), or reads them again (float32).
    """
    return (inputs[0].contiguous(),)


# Otherwise a pipeline logs that it does not know this class.
AutoModelForCausalLM.register(_PrefixBloomConfig, PrefixBloom)
