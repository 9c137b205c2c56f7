"""Many prompts at once."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from prefix_tuning import signals
from prefix_tuning.generation.options import is_continuable, resolve_options
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.generation.sampling import row_draws

FEW_ROWS = 4  # a batch of no more is not made smaller: starting again would cost more than it saves


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
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    first: int = 0,
    **options,
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Completes prompts, similar ones together: those of one prefix, and of these, such as are about as long.

    Yields for every batch, as it is done, the places of its prompts and the completions of each: num_return_sequences of
    them, without special tokens. prefix_name: as for `PrefixBloom.generate`. seed: makes sampling repeatable; what is drawn
    for a prompt depends on this, on its number and on nothing else. numbers: those of the prompts, by default their places.
    first: batches whose places all come before it are left out. options: those of transformers' `generate`, of which
    max_new_tokens is needed. Raises ValueError for unknown names.
    """
    names = model.names_of(prefix_name, len(prompts))
    numbers = range(len(prompts)) if numbers is None else numbers
    ids = tokenizer(prompts, split_special_tokens=True).input_ids if prompts else []
    order = sorted(range(len(prompts)), key=lambda place: (names[place], len(ids[place])))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        if max(places) < first:
            continue
        inputs = tokenizer.pad({"input_ids": [ids[place] for place in places]}, padding_side="left", return_tensors="pt")
        seeds = [(seed, numbers[place]) for place in places]
        replies = _replies(
            model, inputs.to(model.device), [names[place] for place in places], seeds, tokenizer=tokenizer, **options
        )
        if signals.heard():  # these are cut short, and who called asks all processes by stop_if_heard
            return
        texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
        each = len(texts) // len(places)
        yield places, [texts[i : i + each] for i in range(0, len(texts), each)]


def _replies(
    model: PrefixBloom, inputs, names: list[str], seeds: list[tuple[int, int]], generation_config=None, **options
) -> list[torch.Tensor]:
    """The new tokens of every row of a tokenised batch: of every sequence, where there are several to a row.

    Where each row is a sequence of its own, rows that have ended leave the batch as soon as they are half of it; the others
    continue from what is in their past_key_values. The text is the same; the work is less where some answers are long.
    seeds: what each row's draws depend on.
    """
    ids, mask = inputs.input_ids, inputs.attention_mask
    tokens = ids.shape[1]
    settings, options = resolve_options(model.generation_config, generation_config, options)
    settings.return_dict_in_generate = False
    if len(names) <= FEW_ROWS or not is_continuable(settings, options):
        options["stopping_criteria"] = StoppingCriteriaList([*options.get("stopping_criteria", ()), _Heard()])
        with row_draws(settings, seeds):
            output = model.generate(ids, settings, attention_mask=mask, prefix_name=names, **options)
        return list(output[:, tokens:])
    left = settings.max_new_tokens
    _, cache = model.prepend(mask, names)
    ended = _HalfEnded(tokens, settings.eos_token_id)
    rows, replies = torch.arange(len(ids)), [ids[0, :0]] * len(ids)
    while len(rows) and not signals.heard():
        settings.max_new_tokens = left
        options["stopping_criteria"] = StoppingCriteriaList([_Heard(), *([ended] if len(rows) > FEW_ROWS else [])])
        with row_draws(settings, [seeds[row] for row in rows.tolist()], ids.shape[1] - tokens):
            ids = model.generate(ids, settings, attention_mask=mask, past_key_values=cache, **options)
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


class _Heard(StoppingCriteria):
    """Stops all rows once the process has heard a signal."""

    def __call__(self, input_ids, scores, **options):
        return torch.full((len(input_ids),), signals.heard() > 0, device=input_ids.device)


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
