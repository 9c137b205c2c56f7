"""Many prompts: how they are put into batches, and how a batch is answered."""

from collections.abc import Iterable, Sequence
from itertools import chain, groupby, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from prefix_tuning import signals
from prefix_tuning.base_model.loading import ends_of
from prefix_tuning.base_model.sharding import is_sharded
from prefix_tuning.devices import prompt_tokens, suggested_max_tokens
from prefix_tuning.generation.options import depends_on_padding, is_continuable, resolve_options
from prefix_tuning.generation.prefix_bloom import Names, PrefixBloom
from prefix_tuning.generation.sampling import row_draws

FEW_ROWS = 4  # a batch of at most 4 rows is not shrunk: another call of `generate` would cost more than it saves


class Prompt(NamedTuple):
    """A tokenised prompt. With do_sample, its answer depends on its number and the seed, not on the prompts beside it.

    limit: the largest number of tokens of its reply; None: max_new_tokens.
    """

    ids: list[int]
    prefix_name: str
    number: int
    limit: int | None = None


def complete(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    prefix_name: Names = None,
    batch_size: int = 64,
    max_tokens: int | None = None,
    limits: Sequence[int] | None = None,
    **options,
) -> list[str]:
    """The completion of each prompt, in their order; of several sequences per prompt, the first.

    prompts: token ids. max_tokens: tokens of all prompts of a batch, padding included; None: `tokens_at_once`. limits: the
    largest number of tokens of each reply, instead of one max_new_tokens. options: see `complete_batch`. After a signal, the
    remaining answers are cut short or empty, and the caller has to check for it. Raises ValueError for unknown prefixes.
    """
    names = model.names_of(prefix_name, len(prompts))
    answers = [""] * len(prompts)
    asked = map(Prompt, prompts, names, range(len(prompts)), limits or repeat(None))
    for batch in batches_of(asked, batch_size, max_tokens or tokens_at_once(model)):
        if signals.heard():
            break
        for prompt, (answer, *_) in zip(batch, complete_batch(model, tokenizer, batch, **options), strict=True):
            answers[prompt.number] = answer
    return answers


def tokens_at_once(model: PrefixBloom) -> int:
    """The number of tokens of a batch of prompts, padding included, that suits device and model."""
    return prompt_tokens(suggested_max_tokens(model, gathers=is_sharded(model)))


def batches_of(prompts: Iterable[Prompt], batch_size: int, max_tokens: int) -> list[list[Prompt]]:
    """Prompts in batches of at most `batch_size` rows and `max_tokens` tokens, padding included.

    They are sorted by prefix and number of tokens, so that there is little padding. A prompt with more tokens is a batch of
    its own.
    """
    batches: list[list[Prompt]] = []
    longest = 0  # tokens of the longest prompt in the last batch
    for prompt in sorted(prompts, key=lambda prompt: (prompt.prefix_name, len(prompt.ids))):
        longest = max(longest, len(prompt.ids))
        if not batches or len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = len(prompt.ids)
        batches[-1].append(prompt)
    return batches


def complete_batch(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Prompt],
    seed: int = 0,
    generation_config: GenerationConfig | None = None,
    **options,
) -> list[list[str]]:
    """The completions of each prompt: num_return_sequences of them, without special tokens.

    seed: with do_sample, an answer depends on it and on the prompt's number alone. options: as for transformers' `generate`.
    """
    limits = [prompt.limit for prompt in batch if prompt.limit is not None]
    if limits:
        options["max_new_tokens"] = max(limits)
    settings, others = resolve_options(model.generation_config, generation_config, options | {"tokenizer": tokenizer})
    settings.return_dict_in_generate = False
    names, longest = [prompt.prefix_name for prompt in batch], max(len(prompt.ids) for prompt in batch)
    alike = [list(group) for _, group in groupby(batch, key=lambda prompt: len(prompt.ids))]
    if len(alike) > 1 and (
        depends_on_padding(settings, tokenizer.pad_token_id)
        or model.outgrows_window(model.length_of(names, len(batch), longest, settings))
    ):
        parts = (complete_batch(model, tokenizer, part, seed, generation_config, **options) for part in alike)
        return list(chain.from_iterable(parts))
    inputs = tokenizer.pad({"input_ids": [prompt.ids for prompt in batch]}, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    keys = [(seed, prompt.number) for prompt in batch]
    if len(batch) > FEW_ROWS and is_continuable(settings, others):
        cache = model.prepend(inputs.attention_mask, names)[1]
        replies = _replies_of_shrinking_batch(model, settings, inputs, cache, keys, limits)
    else:
        others["stopping_criteria"] = [*others.get("stopping_criteria", ()), _SignalHeard()]
        with row_draws(settings, keys):
            output = model.generate(**inputs, generation_config=settings, prefix_name=names, **others)
        replies = output[:, inputs.input_ids.shape[1] :].tolist()
    each = len(replies) // len(batch)
    replies = [reply[: batch[index // each].limit] for index, reply in enumerate(replies)]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    return [texts[start : start + each] for start in range(0, len(texts), each)]


def _replies_of_shrinking_batch(
    model: PrefixBloom,
    settings: GenerationConfig,
    inputs: BatchEncoding,
    cache: Any,
    keys: list[tuple[int, int]],
    limits: list[int],
) -> list[list[int]]:
    """The new ids of each row. Rows that have ended leave the batch as soon as they are half of it.

    The others continue from their part of `cache`, which holds their prefixes. The answers stay the same, but short ones no
    longer cost as much as the longest. settings: `is_continuable`. keys: see `row_draws`. limits: the largest number of
    tokens of each reply; empty: max_new_tokens.
    """
    ids, mask = inputs.input_ids, inputs.attention_mask
    tokens, left = ids.shape[1], settings.max_new_tokens
    most = torch.tensor(limits or [left] * len(ids), device=ids.device)
    rows = torch.arange(len(ids))
    replies: list[list[int]] = [[]] * len(ids)
    while len(rows) and not signals.heard():
        settings.max_new_tokens = left
        half_ended = _HalfEnded(tokens, ends_of(settings), most[rows])
        criteria = [_SignalHeard(), *([half_ended] if len(rows) > FEW_ROWS else [])]
        with row_draws(settings, [keys[row] for row in rows.tolist()], ids.shape[1] - tokens):
            ids = model.generate(ids, settings, attention_mask=mask, cache=cache, stopping_criteria=criteria)
        left -= ids.shape[1] - mask.shape[1]
        done = half_ended.ended(ids[:, tokens:]).cpu()
        for row, reply in zip(rows[done].tolist(), ids[done, tokens:].tolist(), strict=True):
            replies[row] = reply
        rows, kept = rows[~done], (~done).nonzero().flatten().to(ids.device)
        ids = ids[kept]
        mask = F.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(kept)
    return replies


class _SignalHeard(StoppingCriteria):
    """Stops all rows after the process has received a signal."""

    def __call__(self, input_ids, scores, **options):
        return torch.full((len(input_ids),), signals.heard() > 0, device=input_ids.device)


class _HalfEnded(StoppingCriteria):
    """Stops a batch as soon as half of its rows have ended.

    start: index in input_ids at which the replies begin. limits: (rows,), int64, the largest number of tokens of each reply.
    """

    def __init__(self, start: int, ends: list[int], limits: torch.Tensor):
        self.start, self.ends, self.limits = start, torch.tensor(ends), limits

    def ended(self, replies: torch.Tensor) -> torch.Tensor:
        """Which replies (rows, tokens) have ended: (rows,), bool."""
        return torch.isin(replies, self.ends.to(replies.device)).any(dim=1) | (replies.shape[1] >= self.limits)

    def __call__(self, input_ids, scores, **options):
        ended = self.ended(input_ids[:, self.start :])
        return (2 * ended.sum() >= len(ended)).expand(len(ended))
