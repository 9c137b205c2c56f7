"""Answers: transformers' own `generate`, with prefixes as past_key_values, for one question or for many at once."""

import copy
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prefix_tuning import signals
from prefix_tuning.bloom import fingerprint, prefix_cache
from prefix_tuning.checkpoint import Prefix, check_base
from prefix_tuning.sharding import in_step, is_sharded

BASE = "base"  # the name that stands for no prefix
FEW_ROWS = 4  # a batch of no more is not made smaller: starting again would cost more than it saves


class _PrefixBloomConfig(BloomConfig):
    model_type = "prefix-bloom"


class PrefixBloom(BloomForCausalLM):
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
        # accelerate's hooks put a `forward` into the instance, which would hide the one below; for a model with FSDP's mark,
        # `generate` would try to keep processes in step by itself.
        left_out = ("forward", "_old_forward", "_hf_hook", "_is_fsdp_managed_module")
        vars(self).update({name: value for name, value in own.items() if name not in left_out})
        # A prefix lives in the cache, which `generate` makes below.
        self.config.use_cache = self.generation_config.use_cache = True
        self.generation_config.cache_implementation = None
        self.prefixes: dict[str, torch.Tensor] = {}
        self.active = BASE
        self._fingerprint = fingerprint(base, tokenizer)
        for block in self.transformer.h:
            block.mlp.gelu_impl = nn.GELU(approximate="tanh")  # Bloom's GELU in one kernel instead of eight

    @property
    def names(self) -> list[str]:
        """What rows can be answered by: the base, and all prefixes."""
        return [BASE, *self.prefixes]

    def attach(self, name: str, prefix: Prefix | torch.Tensor, force: bool = False) -> None:
        """Makes a prefix usable under a name; one of that name is replaced. The first one attached is in use at once.

        prefix: what `load_prefix` returns, or (layers, 2, heads, tokens, head_dim). Raises UserError if it does not fit the
        base; force: use it although its base had other weights or another tokenizer.
        """
        if name == BASE:
            raise ValueError(f"{BASE!r} is the name of the base without a prefix")
        if not isinstance(prefix, (torch.Tensor, Prefix)):
            raise TypeError(f"a prefix is what load_prefix returns, or a tensor, not {type(prefix).__name__}")
        tensor, noted = (prefix, self._fingerprint) if isinstance(prefix, torch.Tensor) else prefix
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
        self._prefixes_of(name, 1)
        self.active = name

    def _prefixes_of(self, names: str | list[str] | None, rows: int) -> list[torch.Tensor]:
        """The prefix of every row, with no tokens for the base's."""
        names = self.active if names is None else names
        names = [names] * rows if isinstance(names, str) else names
        if len(names) != rows:
            raise ValueError(f"{len(names)} prefixes are named for {rows} rows")
        for name in names:
            if name not in self.names:
                raise ValueError(f"no prefix {name!r}; there are {', '.join(self.names)}")
        shape = self.config
        none = torch.empty(shape.n_layer, 2, shape.n_head, 0, shape.hidden_size // shape.n_head)
        return [self.prefixes.get(name, none).to(self.device, self.dtype) for name in names]

    def prepend(
        self, attention_mask: torch.Tensor, prefix_name: str | list[str] | None = None, copies: int = 1
    ) -> tuple[torch.Tensor, Cache]:
        """The mask of prefix and text, (rows, longest prefix + tokens), and the prefixes as past_key_values.

        attention_mask: the text's own, (rows, tokens). prefix_name: one for all rows, or one for each; None: the one in use.
        copies: `generate` will repeat each row this often, as beams or sequences; the past_key_values do so already.
        """
        prefixes = self._prefixes_of(prefix_name, len(attention_mask))
        cache, mask = prefix_cache([tensor for tensor in prefixes for _ in range(copies)])
        cache.prefix_mask = mask[::copies]  # for `generate`, should it go on from this cache
        return torch.cat((cache.prefix_mask, attention_mask), dim=1), cache

    def in_step(self) -> AbstractContextManager[None]:
        """`sharding.in_step` around what several processes generate, each as many tokens as it likes."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return in_step(self, torch.no_grad()(lambda: self(token)))

    @functools.wraps(BloomForCausalLM.forward)  # transformers reads off the signature what a model can do
    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, inputs_embeds=None, *, prefix_name=None, **options
    ):
        """transformers' forward after the prefix in use, or `prefix_name`: one for all rows, or one for each.

        With past_key_values, it goes on from there and adds no prefix.
        """
        if past_key_values is None:
            text = input_ids if inputs_embeds is None else inputs_embeds
            if attention_mask is None:
                attention_mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
            attention_mask, past_key_values = self.prepend(attention_mask, prefix_name)
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
        transformers compiles it. With the past_key_values of an earlier call and the whole text so far, it goes on from
        there, after the prefix of that call. Raises ValueError for what a prefix rules out: other kinds of cache or none,
        inputs_embeds, assisted generation.
        """
        input_ids = options.pop("input_ids", inputs)
        if self.generation_config.cache_implementation:
            raise ValueError("give cache_implementation to `generate`, not to the model's generation_config")
        settings = copy.deepcopy(generation_config or self.generation_config)
        options = settings.update(**options)  # what is left is for `generate` itself
        for name, value in vars(self.generation_config).items():  # as transformers does; some of it matters here already
            if getattr(settings, name, None) is None:
                setattr(settings, name, value)
        ruled_out = ("inputs_embeds", "assistant_model", "prompt_lookup_num_tokens")
        for name in ruled_out:
            if options.get(name) is not None or getattr(settings, name, None) is not None:
                raise ValueError(f"{name} does not go with a prefix")
        implementation, settings.cache_implementation = settings.cache_implementation, None  # the cache is made here
        if settings.use_cache is False or implementation not in (None, "dynamic", "static"):
            raise ValueError("a prefix needs a dynamic or a static cache to live in: use_cache or cache_implementation")
        if input_ids is None:
            raise ValueError("input_ids are missing")
        mask = options.pop("attention_mask", None)
        if mask is None:
            mask = _guessed_mask(input_ids, settings)
        cache, dummies = options.pop("past_key_values", None), 0
        if cache is None:
            copies = max(settings.num_beams or 1, settings.num_return_sequences or 1)
            mask, cache = self.prepend(mask, prefix_name, copies)
            if implementation == "static":
                cache = self._static(cache, mask.shape[1] + _room(settings, input_ids.shape[1]))
        elif prefix_name is not None:
            raise ValueError("past_key_values hold a prefix already; leave out prefix_name")
        elif hasattr(cache, "prefix_mask") and mask.shape[1] == input_ids.shape[1]:
            # transformers wants ids for all that the cache holds. A prefix has none; an id that the row has anyway changes
            # nothing for a repetition penalty.
            dummies = cache.prefix_mask.shape[1]
            input_ids = torch.cat((input_ids[:, -1:].expand(-1, dummies), input_ids), dim=1)
            mask = torch.cat((cache.prefix_mask, mask), dim=1)
        output = super().generate(input_ids, settings, attention_mask=mask, past_key_values=cache, **options)
        if isinstance(output, torch.Tensor):
            return output[:, dummies:]
        output.sequences = output.sequences[:, dummies:]
        return output

    def _static(self, filled: Cache, length: int) -> StaticCache:
        """What a cache holds, in one that has place for `length` positions."""
        cache = StaticCache(self.config, max_cache_len=length)
        for index, layer in enumerate(filled.layers):
            cache.update(layer.keys, layer.values, index)
        cache.prefix_mask = filled.prefix_mask
        return cache


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


def complete(model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **options) -> list[str]:
    """The completion of each prompt, in their order. options: those of `complete_batches`."""
    answers = [""] * len(prompts)
    for places, completions in complete_batches(model, tokenizer, prompts, **options):
        for place, (answer, *_) in zip(places, completions, strict=True):
            answers[place] = answer
    return answers


def complete_batches(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    prefix_name: str | list[str] | None = None,
    batch_size: int = 64,
    seed: int | None = None,
    first: int = 0,
    **options,
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Completes prompts, similar ones together: those of one prefix, and of these, such as are about as long.

    Yields for every batch, as it is done, the places of its prompts and the completions of each: num_return_sequences of
    them, without special tokens. prefix_name: as for `PrefixBloom.generate`. seed: makes every batch's sampling repeatable.
    first: batches whose places all come before it are left out. options: those of transformers' `generate`, of which
    max_new_tokens is needed.
    """
    names = prefix_name if isinstance(prefix_name, list) else [prefix_name or model.active] * len(prompts)
    ids = tokenizer(prompts, split_special_tokens=True).input_ids if prompts else []
    order = sorted(range(len(prompts)), key=lambda place: (names[place], len(ids[place])))
    for start in range(0, len(order), batch_size):
        if signals.heard():  # nobody wants the answers any more
            return
        places = order[start : start + batch_size]
        if max(places) < first:
            continue
        if seed is not None:
            torch.manual_seed(seed + start)
        inputs = tokenizer.pad({"input_ids": [ids[place] for place in places]}, padding_side="left", return_tensors="pt")
        replies = _replies(model, inputs.to(model.device), [names[place] for place in places], **options)
        texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
        each = len(texts) // len(places)
        yield places, [texts[i : i + each] for i in range(0, len(texts), each)]


def _replies(model: PrefixBloom, inputs, names: list[str], **options) -> list[torch.Tensor]:
    """The new tokens of every row of a tokenised batch: of every sequence, where there are several to a row.

    Where each row is a sequence of its own, rows that have ended leave the batch as soon as they are half of it; the others
    go on from what is in their past_key_values. The text is the same; the work is less where some answers are long.
    """
    ids, mask = inputs.input_ids, inputs.attention_mask
    tokens, options["pad_token_id"] = ids.shape[1], model.generation_config.pad_token_id
    settings = {**vars(model.generation_config), **options}
    several = (settings.get("num_beams") or 1) > 1 or (settings.get("num_return_sequences") or 1) > 1
    counting = ("cache_implementation", "min_new_tokens", "min_length")  # these would start anew with each call
    if several or any(settings.get(name) for name in counting) or len(names) <= FEW_ROWS:
        output = model.generate(ids, attention_mask=mask, prefix_name=names, **options)
        return list(output[:, tokens:])
    left = options.pop("max_new_tokens")
    all_mask, cache = model.prepend(mask, names)
    ended = _HalfEnded(all_mask.shape[1], model.generation_config.eos_token_id)
    rows, replies = torch.arange(len(ids)), [ids[0, :0]] * len(ids)
    while len(rows):
        criteria = StoppingCriteriaList([ended] if len(rows) > FEW_ROWS else [])
        ids = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=left, stopping_criteria=criteria, **options
        )
        left -= ids.shape[1] - mask.shape[1]
        done = ended.among(ids[:, tokens:]).cpu() | (left == 0)
        for row, reply in zip(rows[done].tolist(), ids[done, tokens:], strict=True):
            replies[row] = reply
        rows, others = rows[~done], (~done).nonzero().flatten().to(ids.device)
        ids = ids[others]
        mask = F.pad(mask[others], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(others)
        cache.prefix_mask = cache.prefix_mask[others]
    return replies


class _HalfEnded(StoppingCriteria):
    """Stops a batch as soon as half of its rows have ended."""

    def __init__(self, start: int, eos_token_id: int | list[int] | None):
        self.start, self.eos = start, torch.tensor([] if eos_token_id is None else eos_token_id).flatten()

    def among(self, replies: torch.Tensor) -> torch.Tensor:
        """Which replies have ended: (rows,), bool."""
        return torch.isin(replies, self.eos.to(replies.device)).any(dim=1)

    def __call__(self, input_ids, scores, **options):
        ended = self.among(input_ids[:, self.start :])
        return (2 * ended.sum() >= len(ended)).expand(len(ended))
