"""How good is a prefix: held-out loss, perplexity, exact match; and when a training run asks for them."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefix_tuning import distributed, signals
from prefix_tuning.data.rows import question_of, take
from prefix_tuning.devices import prompt_tokens
from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import EMPTY_BATCH, IGNORED, Batch, Example, count_labels, pack
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.text import shorten

SORTED_ROWS = 1024  # rows that are sorted by length together
# Tokens of a reply beyond those of the expected answer: the same text may be other tokens, and a reply that goes on behind a
# space or a new line must not look like one that ends there.
SPARE_TOKENS = 8
SHOWN_ANSWERS = 5
# Tokens of the longest expected answer that is shown: longer ones take minutes on a CPU, and do not fit on a line.
LONGEST_SHOWN = 64


@torch.no_grad()
def row_losses(
    model: Bloom, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int
) -> Iterator[tuple[float, int]]:
    """Of every row of a tokenised dataset, in order: cross-entropy in nats, summed over its labels, and their number.

    All ranks call this together, each for its own rows. It ends early, in all of them, once one was sent a signal.
    """
    found: dict[int, tuple[float, int]] = {}
    following = 0  # the row to yield next
    for places, batch in _passes_of_all_ranks(_passes(tokenized, max_tokens)):
        losses = model.label_losses(batch.to(model.device), prefix).double().cpu()
        counts = [count for _, count in places]
        for (place, count), part in zip(places, losses.split(counts), strict=True):
            found[place] = part.sum().item(), count
        while following in found:
            yield found.pop(following)
            following += 1


def _passes(tokenized: Dataset, max_tokens: int) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
    """The rows, packed; with each batch, the place and the number of labels of each of its rows."""
    for start in range(0, len(tokenized), SORTED_ROWS):
        examples = take(tokenized, list(range(start, min(start + SORTED_ROWS, len(tokenized)))))
        order = iter(sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids)))  # as `pack` does
        for batch in pack(examples, max_tokens):
            rows = list(itertools.islice(order, batch.rows))
            yield [(start + row, count_labels([examples[row]])) for row in rows], batch


def _passes_of_all_ranks(passes: Iterator[tuple[list, Batch]]) -> Iterator[tuple[list, Batch]]:
    """The passes, and empty ones until no rank has any left, as a sharded base is gathered by all ranks in each pass.

    An all-reduce before each pass asks for that, and for signals: if a rank was sent one, this ends in all of them.
    """
    while True:
        following = next(passes, None)
        busy, signal = zip(*distributed.gather_numbers([following is not None, signals.heard()]), strict=True)
        if any(signal) or not any(busy):
            return
        yield following or ([], EMPTY_BATCH)


def evaluate_loss(model: Bloom, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int) -> dict[str, float]:
    """Mean cross-entropy per label in nats, and its exponential, over a tokenised dataset; processes share the rows.

    Raises Interrupted in all of them, after the current pass, if one was sent a signal.
    """
    own = tokenized.select(distributed.share(range(len(tokenized))))
    losses, labels = 0.0, 0
    for loss, count in row_losses(model, own, prefix, max_tokens):
        losses, labels = losses + loss, labels + count
    signals.stop_if_heard()
    all_losses, all_labels = distributed.sum_over_ranks([losses, labels])
    return {"eval_loss": all_losses / all_labels, "eval_perplexity": perplexity(all_losses / all_labels)}


def perplexity(loss: float) -> float:
    """exp(loss), or the largest of those that a float can hold."""
    return math.exp(min(loss, 700))  # e ** 710 overflows


class Turn(NamedTuple):
    """The last turn of a row as token ids: the turns before it, its prompt, and of its answer what --max_length leaves."""

    history: list[int]
    prompt: list[int]
    answer: list[int]


def last_turn(example: Example) -> Turn:
    """The last turn of a row that has labels."""
    tokens = zip(example.input_ids, example.labels, strict=True)
    runs = [[token for token, _ in run] for _, run in itertools.groupby(tokens, key=lambda pair: pair[1] != IGNORED)]
    if example.labels[-1] == IGNORED:
        runs.pop()
    *history, prompt, answer = runs
    return Turn([*itertools.chain(*history)], prompt, answer)


def answer_turns(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    prefix: torch.Tensor | None,
    max_tokens: int,
) -> list[str]:
    """Greedy answers to the prompts of these turns, each with its history in front.

    Each reply may be a few tokens longer than the expected answer; if --max_length has cut that, just as long. max_tokens:
    of a training pass. Processes share the turns, and all get all answers. Raises Interrupted in all of them, after the
    current batch, if one was sent a signal.
    """
    own = distributed.share(turns)
    limits = [len(turn.answer) + SPARE_TOKENS * (turn.answer[-1] == tokenizer.eos_token_id) for turn in own]
    name = BASE
    if prefix is not None:
        name = "prefix"
        model.attach(name, prefix)
    with model.equal_passes():
        replies = complete(
            model,
            tokenizer,
            [turn.history + turn.prompt for turn in own],
            prefix_name=name,
            max_tokens=prompt_tokens(max_tokens),
            limits=limits,
            do_sample=False,
        )
    signals.stop_if_heard()
    answers = [""] * len(turns)
    for process, part in enumerate(parts := distributed.gather(replies)):
        answers[process :: len(parts)] = part
    return answers


def expected_answers(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> list[str]:
    """The answers that the rows have, as far as --max_length keeps them."""
    return tokenizer.batch_decode([turn.answer for turn in turns], skip_special_tokens=True)


def exact_match(answers: list[str], expected: list[str]) -> float:
    """Share of answers that equal the expected ones, surrounding white space aside."""
    return sum(answer.strip() == other.strip() for answer, other in zip(answers, expected, strict=True)) / len(expected)


@dataclass
class Evaluator:
    """Measures a prefix on the held-out rows and prints the figures; after the run, shows answers to a few of them.

    tokenized: the held-out rows; None: there are none, and no evaluation is ever due. every: steps between evaluations;
    None: one at the end of each epoch. wants_answers: also answer the questions. patience: evaluations without a lower loss
    that end the run; None: none do. keep_best: the weights with the lowest loss are kept.
    """

    base: Bloom
    tokenizer: PreTrainedTokenizerBase
    tokenized: Dataset | None
    max_tokens: int  # of one forward pass of training
    total_steps: int
    every: int | None = None
    wants_answers: bool = False
    patience: int | None = None
    keep_best: bool = False

    def due(self, state) -> bool:
        """Whether to evaluate the prefix now. state: the TrainingState of the run.

        The last step is evaluated after its prefix is saved (training/run.py).
        """
        progress = state.progress
        interval_ends = progress.step % self.every == 0 if self.every else progress.row == 0
        return interval_ends and 0 < progress.step < self.total_steps and self.pending(state)

    def pending(self, state) -> bool:
        """Whether there are held-out rows on which the prefix was not evaluated at this step."""
        return self.tokenized is not None and state.progress.evaluated_step != state.progress.step

    def out_of_patience(self, state) -> bool:
        return self.patience is not None and state.progress.evaluations_since_best >= self.patience

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match. All ranks call this together.

        prefix: (layers, 2, heads, tokens, head_dim); None: the frozen base alone.
        """
        figures = evaluate_loss(self.base, self.tokenized, prefix, self.max_tokens)
        line = f"{title}: eval loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}"
        if self.wants_answers:
            turns = list(self._turns())
            answers = self._answers(turns, prefix)
            figures["eval_exact_match"] = exact_match(answers, expected_answers(self.tokenizer, turns))
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(answers)} held-out questions"
        tqdm.write(line)
        return figures

    def _turns(self) -> Iterator[Turn]:
        """The questions of the held-out rows."""
        return (last_turn(take(self.tokenized, [row])[0]) for row in range(len(self.tokenized or ())))

    def _answers(self, turns: list[Turn], prefix: torch.Tensor | None) -> list[str]:
        return answer_turns(self._prefixed, self.tokenizer, turns, prefix, self.max_tokens)

    @functools.cached_property
    def _prefixed(self) -> PrefixBloom:
        """The base with room for the prefix. It decodes as it is told, whatever the base's own generation_config says: a
        repetition_penalty, say, would keep an answer from being the likeliest one.
        """
        model = PrefixBloom(self.base, self.tokenizer)
        own = model.generation_config
        model.generation_config = GenerationConfig(
            eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id, use_cache=True
        )
        return model

    def show_answers(self, prefix: torch.Tensor) -> None:
        """Prints the first held-out questions whose expected answers are short, with those of the frozen base and of the
        prefix. All ranks call this together.
        """
        short = (turn for turn in self._turns() if len(turn.answer) <= LONGEST_SHOWN)
        turns = list(itertools.islice(short, SHOWN_ANSWERS))
        if not turns:
            return
        prompts = self.tokenizer.batch_decode([turn.prompt for turn in turns])
        expected = expected_answers(self.tokenizer, turns)
        base, tuned = (self._answers(turns, pairs) for pairs in (None, prefix))
        for prompt, by_base, by_prefix, answer in zip(prompts, base, tuned, expected, strict=True):
            texts = {"question": question_of(prompt), "frozen base": by_base, "with prefix": by_prefix, "expected": answer}
            for title, text in texts.items():
                print(f"  {title:12s} {shorten(text, 80)}")
            print()
