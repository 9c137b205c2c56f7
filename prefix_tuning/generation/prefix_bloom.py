"""PrefixBloom"""

import copy
import functools
from contextlib import AbstractContextManager

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
from prefix_tuning.base_model.sharding import in_step, is_sharded
from prefix_tuning.files.prefixes import SavedPrefix
from prefix_tuning.model.bloom import Bloom, add_packed_forward, prefix_cache

BASE = "base"  # the name that stands for no prefix


class _PrefixBloomConfig(BloomConfig):
    model_type = "prefix-bloom"


class PrefixBloom(Bloom):
    """A Bloom that has any number of prefixes, of which every row of a batch can use its own.

        model = PrefixBloom(base)                                # any BloomForCausalLM that lies on one device
        model.attach("short", load_prefix("./chatbot"))
        model.generate(**inputs)                                 # with the prefix in use: the first one attached
        model.generate(**inputs, prefix_name=["short", "base"])  # by row; "base" is the frozen base alone
        model.use("base")
        model.detach("short")

    It is a BloomForCausalLM itself, made of new modules around the tensors of `base`: what takes one, such as transformers'
    pipeline, takes this. None of the above changes `base`; but the weights are in memory once, so who changes them changes
    them for both. (A base that is sharded over processes cannot be copied: its modules and its config are taken over.)
    """

    config_class = _PrefixBloomConfig

    def __init__(self, base: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None):
        """tokenizer: if given, prefixes that were trained with another one are refused."""
        if not isinstance(base, BloomForCausalLM):
            raise TypeError(f"PrefixBloom wants a loaded BloomForCausalLM, not {type(base).__name__}")
        if len({tensor.device for tensor in base.parameters()} | {base.device}) > 1 or base.device.type == "meta":
            raise ValueError("PrefixBloom wants a base that lies whole on one device")
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        own = vars(base if is_sharded(base) else copy.deepcopy(base, shared))  # what is sharded cannot be copied
        # accelerate and PEFT put methods into the instance, which would hide those below; for a model with FSDP's mark,
        # `generate` would try to keep processes in step by itself.
        left_out = ("forward", "_old_forward", "_hf_hook", "prepare_inputs_for_generation", "_is_fsdp_managed_module")
        vars(self).update({name: value for name, value in own.items() if name not in left_out})
        # A prefix lives in the cache, which `generate` makes below.
        self.config.use_cache = self.generation_config.use_cache = True
        self.generation_config.cache_implementation = None
        self.prefixes: dict[str, torch.Tensor] = {}
        self.active = BASE
        self._fingerprint = fingerprint(base, tokenizer)
        add_packed_forward(self)
        for block in self.transformer.h:
            block.mlp.gelu_impl = nn.GELU(approximate="tanh")  # Bloom's GELU in one kernel instead of eight

    @property
    def names(self) -> list[str]:
        """What rows can be answered by: the base, and all prefixes."""
        return [BASE, *self.prefixes]

    def attach(self, name: str, prefix: SavedPrefix | torch.Tensor, force: bool = False) -> None:
        """Makes a prefix usable under a name; one of that name is replaced. The first one attached is in use at once.

        prefix: what `load_prefix` returns, or (layers, 2, heads, tokens, head_dim). Raises UserError if it does not fit the
        base, TypeError or ValueError if it is no prefix; force: use it although its base had other weights or another
        tokenizer.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of a prefix is a str, not {type(name).__name__}")
        if name == BASE:
            raise ValueError(f"{BASE!r} is the name of the base without a prefix")
        if not isinstance(prefix, (torch.Tensor, SavedPrefix)):
            raise TypeError(f"a prefix is what load_prefix returns, or a tensor, not {type(prefix).__name__}")
        tensor, noted = (prefix, self._fingerprint) if isinstance(prefix, torch.Tensor) else prefix
        if tensor.dim() != 5 or tensor.shape[1] != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError("a prefix is (layers, 2, heads, tokens, head_dim), of a float type and finite")
        check_base(tensor.shape, noted, self._fingerprint, name, force)
        if not self.prefixes:
            self.active = name
        self.prefixes[name] = tensor.detach().to(self.device, self.dtype)

    def detach(self, name: str) -> None:
        """Takes a prefix away. If it is in use, the base answers alone from then on. Raises ValueError for unknown names."""
        if name not in self.prefixes:
            raise ValueError(f"no prefix {name!r}; there are {', '.join(self.prefixes) or 'none'}")
        del self.prefixes[name]
        if self.active == name:
            self.active = BASE

    def use(self, name: str) -> None:
        """Says which prefix rows use that name none; "base": none at all. Raises ValueError for unknown names."""
        self._check_name(name)
        self.active = name

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"no prefix {name!r}; there are {', '.join(self.names)}")

    def names_of(self, prefix_name: str | list[str] | None, rows: int) -> list[str]:
        """The name of every row's prefix. prefix_name: one for all rows, or one for each; None: the one in use.

        Raises ValueError for unknown names, and where there are not as many as rows.
        """
        prefix_name = self.active if prefix_name is None else prefix_name
        if isinstance(prefix_name, str):
            self._check_name(prefix_name)
            return [prefix_name] * rows
        for name in prefix_name:
            self._check_name(name)
        if len(prefix_name) != rows:
            raise ValueError(f"{len(prefix_name)} prefixes are named for {rows} rows")
        return prefix_name

    def _prefixes_of(self, prefix_name: str | list[str] | None, rows: int) -> list[torch.Tensor]:
        """The prefix of every row, with no tokens for the base's."""
        shape = self.config
        none = torch.empty(shape.n_layer, 2, shape.n_head, 0, shape.hidden_size // shape.n_head)
        return [self.prefixes.get(name, none).to(self.device, self.dtype) for name in self.names_of(prefix_name, rows)]

    def prepend(
        self,
        attention_mask: torch.Tensor,
        prefix_name: str | list[str] | None = None,
        copies: int = 1,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """The mask of prefix and text, (rows, longest prefix + tokens), and the prefixes as past_key_values.

        attention_mask: the text's own, (rows, tokens). prefix_name: as for `names_of`. copies: `generate` will repeat each
        row this often, as beams or sequences; the past_key_values do so already. cache: an empty one to fill; None: a new
        DynamicCache.
        """
        prefixes = self._prefixes_of(prefix_name, len(attention_mask))
        cache, mask = prefix_cache([tensor for tensor in prefixes for _ in range(copies)], cache)
        cache.prefix_mask = mask  # marks the cache as one that begins with prefixes, for the calls that continue from it
        return torch.cat((mask[::copies], attention_mask), dim=1), cache

    def _is_empty(self, cache: Cache | None, prefix_name: str | list[str] | None, rows: int) -> bool:
        """Whether past_key_values are still to get their prefixes.

        Raises ValueError where they hold text without a prefix although these rows have one, or where they hold prefixes
        and others are named.
        """
        if cache is None:
            return True
        if not isinstance(cache, (DynamicCache, StaticCache)):
            raise ValueError(f"past_key_values must be a DynamicCache or a StaticCache, not {type(cache).__name__}")
        if not hasattr(cache, "prefix_mask"):
            if cache.get_seq_length() == 0:
                return True
            if set(self.names_of(prefix_name, rows)) != {BASE}:
                raise ValueError(f"past_key_values hold text but no prefix: begin with an empty cache, or name {BASE!r}")
            return False
        # A cache that was reset has lost its prefixes. A compiled forward cannot look; `generate` has, before.
        if not torch.compiler.is_compiling() and cache.get_seq_length() < cache.prefix_mask.shape[1]:
            return True
        if prefix_name is not None:
            raise ValueError("past_key_values hold a prefix already; leave out prefix_name")
        return False

    def in_step(self) -> AbstractContextManager[None]:
        """`sharding.in_step` around what several processes generate, each as many tokens as it likes."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return in_step(self, torch.no_grad()(lambda: self(token)))

    @functools.wraps(BloomForCausalLM.forward)  # transformers reads off the signature what a model can do
    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, inputs_embeds=None, *, prefix_name=None, **options
    ):
        """transformers' forward after the prefix in use, or `prefix_name`: one for all rows, or one for each.

        The prefix goes into past_key_values that are empty. Those that hold one already continue from there; those that hold
        text alone are for the base, and a ValueError for a prefix.
        """
        text = input_ids if inputs_embeds is None else inputs_embeds
        if text is not None and self._is_empty(past_key_values, prefix_name, len(text)):
            if attention_mask is None:
                attention_mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
            attention_mask, past_key_values = self.prepend(attention_mask, prefix_name, cache=past_key_values)
            if (room := past_key_values.get_max_length(layer_idx=0)) > 0:  # a static one: Bloom wants a mask of its length
                attention_mask = F.pad(attention_mask, (0, room - attention_mask.shape[1]))
        elif text is not None and hasattr(past_key_values, "prefix_mask") and not torch.compiler.is_compiling():
            prefix_mask = past_key_values.prefix_mask
            tokens = past_key_values.get_seq_length() + text.shape[1] - prefix_mask.shape[1]  # of the text so far
            if attention_mask is None:
                attention_mask = torch.ones(len(text), tokens, dtype=torch.long, device=text.device)
            if attention_mask.shape[1] == tokens:  # that of the text alone, as transformers' users write it
                attention_mask = torch.cat((prefix_mask, attention_mask), dim=1)
        return super().forward(input_ids, past_key_values, attention_mask, inputs_embeds, **options)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        prefix_name: str | list[str] | None = None,
        **options,
    ):
        """transformers' `generate` after the prefix in use, or `prefix_name`: one for all rows, or one for each.

        inputs (or input_ids): (rows, tokens), padded on the left. cache_implementation="static" is compiled where
        transformers compiles it. past_key_values: an empty cache gets the prefix; with those of an earlier call, and the
        whole text so far, it continues after the prefix of that call. Lengths, stopping criteria and streamers know the text
        alone. Raises ValueError for what a prefix rules out: other kinds of cache or none, inputs_embeds, assisted
        generation, guidance_scale, chunks of the prompt.
        """
        input_ids = options.pop("input_ids", inputs)
        if self.generation_config.cache_implementation:
            raise ValueError("give cache_implementation to `generate`, not to the model's generation_config")
        settings, options = self._settings(generation_config, options)
        if settings.guidance_scale == 1:  # has no effect
            settings.guidance_scale = None
        ruled_out = ("inputs_embeds", "assistant_model", "prompt_lookup_num_tokens", "guidance_scale", "prefill_chunk_size")
        for name in ruled_out:
            if options.get(name) is not None or getattr(settings, name, None) is not None:
                raise ValueError(f"{name} does not go with a prefix")
        if settings.use_cache is False or settings.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError("a prefix needs a dynamic or a static cache to live in: use_cache or cache_implementation")
        if input_ids is None:
            raise ValueError("input_ids are missing")
        mask = options.pop("attention_mask", None)
        if mask is None:
            mask = _guessed_mask(input_ids, settings)
        cache = options.pop("past_key_values", None)
        if empty := self._is_empty(cache, prefix_name, len(input_ids)):
            if mask.shape != input_ids.shape:
                raise ValueError(f"attention_mask is {tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}")
            cache = self._begin(cache, settings, mask, prefix_name)
        # transformers also takes the new ids alone, with a mask over all that is cached: there the prefix has its part.
        if empty or mask.shape[1] == input_ids.shape[1]:
            cache.prefix_mask = prefix_mask = getattr(cache, "prefix_mask", mask[:, :0])
            new = prefix_mask.shape[1] + mask.shape[1] - cache.get_seq_length()
            if not 0 < new <= input_ids.shape[1]:
                raise ValueError("input_ids must be the whole text so far, and longer than what past_key_values hold of it")
            options["prefix_mask"] = prefix_mask[:: len(prefix_mask) // len(mask)]  # one of those that are a row's copies
        return super().generate(input_ids, settings, attention_mask=mask, past_key_values=cache, **options)

    def _begin(self, cache: Cache | None, settings: GenerationConfig, mask: torch.Tensor, prefix_name) -> Cache:
        """The empty cache, or a new one of the kind that is set, with the prefixes in it and room for text and answer."""
        longest = max(prefix.shape[3] for prefix in self._prefixes_of(prefix_name, len(mask)))
        length = longest + mask.shape[1] + _room(settings, mask.shape[1])
        if cache is None:
            static = settings.cache_implementation == "static"
            cache, settings.cache_implementation = StaticCache(self.config, length) if static else DynamicCache(), None
        elif -1 < (room := cache.get_max_length(layer_idx=0)) < length - 1:  # the last token does not go into it
            raise ValueError(f"past_key_values have room for {room} tokens; prefix, text and answer need {length - 1}")
        copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        return self.prepend(mask, prefix_name, copies, cache)[1]

    def _settings(self, generation_config: GenerationConfig | None, options: dict) -> tuple[GenerationConfig, dict]:
        """What is set for `generate`: by its options, else by its generation_config, else by the model's own; and what of
        the options is left for `generate` itself."""
        settings = copy.deepcopy(generation_config or self.generation_config)
        options = settings.update(**options)
        for name, value in vars(self.generation_config).items():
            if getattr(settings, name, None) is None:
                setattr(settings, name, value)
        return settings, options

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        is_first_iteration=False,
        *,
        prefix_mask=None,
        **options,
    ):
        """Where transformers' `generate`, which knows the text alone, meets the cache, which begins with the prefix.

        prefix_mask: the prefix's part of the mask, (rows, longest prefix); None: attention_mask has it.
        """
        if prefix_mask is not None:
            if attention_mask is None:  # transformers drops a mask of ones
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat((prefix_mask, attention_mask), dim=1)
            if is_first_iteration:
                next_sequence_length = attention_mask.shape[1] - int(past_key_values.get_seq_length())
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **options,
        )


def _guessed_mask(input_ids: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """What transformers takes for padding where no mask is given."""
    pad, eos = settings.pad_token_id, torch.tensor([] if settings.eos_token_id is None else settings.eos_token_id)
    if pad is None or pad in eos.flatten().tolist():
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def _room(settings: GenerationConfig, tokens: int) -> int:
    """New tokens that a text of so many may get."""
    return settings.max_new_tokens or (settings.max_length or tokens + 20) - tokens  # 20: transformers' default


# Else a pipeline would log that it does not know this class. Configurations stay those of the base.
AutoModelForCausalLM.register(_PrefixBloomConfig, PrefixBloom)
