"""How good a prefix is: held-out loss, perplexity and exact match, and when a training run measures them."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefix_tuning import distributed, signals
from prefix_tuning.base_model.loading import ends_of
from prefix_tuning.data.rows import take
from prefix_tuning.data.templates import Template, question_of
from prefix_tuning.devices import prompt_tokens
from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import EMPTY_BATCH, IGNORED, Batch, Example, count_labels, pack
from prefix_tuning.model.bloom import Objective, PackedModel
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.text import shorten

SORTED_ROWS = 1024  # rows that are sorted by length together
# A reply may be this many tokens longer than the expected answer: the same text may have other tokens, and a reply that goes
# on after a space or a new line must not look like one that ends there.
SPARE_TOKENS = 8
AT_ONCE = 64  # questions that are answered at once, at most
SHOWN_ANSWERS = 5
# Tokens: longer answers are not shown, because they take minutes on a CPU and do not fit on a line.
LONGEST_SHOWN = 64


class RowScore(NamedTuple):
    """loss: of a row in nats, summed over its labels. labels: their number. likeliest: the likeliest token at each label."""

    loss: float
    labels: int
    likeliest: list[int]


def score_rows(model: Objective, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int) -> Iterator[RowScore]:
    """The score of every row of a tokenised dataset, in order.

    All ranks call this together, each for its own rows. It ends early, in all of them, if one of them gets a signal.
    """
    found: dict[int, RowScore] = {}
    following = 0  # the row to yield next
    for rows, batch in _passes_of_all_ranks(_passes(tokenized, max_tokens)):
        losses, likeliest = (x.cpu() for x in model.label_scores(batch.to(model.device), prefix))
        counts = [count for _, count in rows]
        parts = zip(losses.double().split(counts), likeliest.split(counts), strict=True)
        for (row, count), (loss, tokens) in zip(rows, parts, strict=True):
            found[row] = RowScore(loss.sum().item(), count, tokens.tolist())
        while following in found:
            yield found.pop(following)
            following += 1


def _passes(tokenized: Dataset, max_tokens: int) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
    """The rows, packed: the index and the number of labels of each row of a batch, and the batch."""
    for start in range(0, len(tokenized), SORTED_ROWS):
        examples = take(tokenized, list(range(start, min(start + SORTED_ROWS, len(tokenized)))))
        # As `pack` sorts them.
        order = iter(sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids), reverse=True))
        for batch in pack(examples, max_tokens):
            rows = list(itertools.islice(order, batch.rows))
            yield [(start + row, count_labels([examples[row]])) for row in rows], batch


def _passes_of_all_ranks(passes: Iterator[tuple[list, Batch]]) -> Iterator[tuple[list, Batch]]:
    """The passes of this rank, and then empty ones until no rank has any left: all ranks gather a sharded base in each pass.

    An all-reduce before each pass tells who has passes left, and who has got a signal: then this ends in all ranks.
    """
    while True:
        following = next(passes, None)
        busy, signal = zip(*distributed.gather_numbers([following is not None, signals.heard()]), strict=True)
        if any(signal) or not any(busy):
            return
        yield following or ([], EMPTY_BATCH)


def evaluate_rows(
    model: Objective,
    tokenized: Dataset,
    prefix: torch.Tensor | None,
    max_tokens: int,
    verdict: Callable[[int, list[int]], Any] | None = None,
) -> tuple[float, list]:
    """The mean loss per label in nats over a tokenised dataset, and a verdict on each row. The ranks share the rows, and all
    get the same.

    verdict: called with the index of a row and the likeliest tokens at its labels; returns anything that JSON knows. Without
    it the list is empty. Raises Interrupted in all ranks, after the current pass, if one of them gets a signal.
    """
    indices = distributed.share(range(len(tokenized)))
    losses, labels, verdicts = 0.0, 0, []
    scores = score_rows(model, tokenized.select(indices), prefix, max_tokens)
    # The scores come first, because all ranks must run them to their end. A signal may end them early.
    for score, index in zip(scores, indices, strict=False):
        losses, labels = losses + score.loss, labels + score.labels
        if verdict:
            verdicts.append(verdict(index, score.likeliest))
    signals.stop_if_heard()
    all_losses, all_labels = distributed.sum_over_ranks([losses, labels])
    return all_losses / all_labels, distributed.gather_shares(verdicts)


def perplexity(loss: float) -> float:
    """exp(loss); above 700, where a float would soon overflow, exp(700)."""
    return math.exp(min(loss, 700))


class Turn(NamedTuple):
    """The last turn of a row as token ids: the turns before it, its prompt, and its answer, which --max_length may cut."""

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

    A reply may be SPARE_TOKENS longer than the expected answer, but no longer if --max_length has cut that. max_tokens:
    tokens of a training pass. The ranks share the turns, and all get all answers. Raises Interrupted in all ranks, after the
    current batch, if one of them gets a signal.
    """
    ends = ends_of(model.generation_config)
    limits = [len(turn.answer) + SPARE_TOKENS * (turn.answer[-1] in ends) for turn in turns]
    return answer_prompts(model, tokenizer, [turn.history + turn.prompt for turn in turns], limits, prefix, max_tokens)


def answer_prompts(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    limits: list[int],
    prefix: torch.Tensor | None,
    max_tokens: int,
) -> list[str]:
    """Greedy answers to prompts of token ids. limits: the most tokens of each answer. For the rest, see `answer_turns`."""
    name, batch_size, room = BASE, AT_ONCE, prompt_tokens(max_tokens)
    if prefix is not None:
        name = "prefix"
        model.attach(name, prefix)
        # Each row of a batch has its copy of the prefix, which may be a long text.
        batch_size = min(batch_size, max(1, room // prefix.shape[3]))
    with model.equal_passes():
        replies = complete(
            model,
            tokenizer,
            distributed.share(prompts),
            prefix_name=name,
            batch_size=batch_size,
            max_tokens=room,
            limits=distributed.share(limits),
            do_sample=False,
        )
    signals.stop_if_heard()
    return distributed.gather_shares(replies)


def greedy(base: PackedModel, tokenizer: PreTrainedTokenizerBase) -> PrefixBloom:
    """The base with room for prefixes. It ignores most of the base's own generation_config, because a repetition_penalty in
    there, for example, would keep an answer from being the likeliest one.
    """
    model = PrefixBloom(base, tokenizer)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id, use_cache=True
    )
    return model


def expected_answers(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> list[str]:
    """The answers in the rows, as far as --max_length keeps them."""
    # transformers 5.17 makes one empty text of no answers.
    return tokenizer.batch_decode([turn.answer for turn in turns], skip_special_tokens=True) if turns else []


def matching(answers: list[str], expected: list[str]) -> int:
    """How many answers equal the expected ones, apart from surrounding white space."""
    return sum(answer.strip() == other.strip() for answer, other in zip(answers, expected, strict=True))


def foreseen_match(tokenizer: PreTrainedTokenizerBase, turn: Turn, likeliest: list[int]) -> bool | None:
    """Whether greedy generation gives a turn's answer, or None where nobody can tell without generating it.

    likeliest: the likeliest token at each label of the row. Up to the first that is not the label, these are the tokens that
    are generated, apart from rounding. The same text may have other tokens, so only one that no longer begins the answer's
    text is wrong.
    """
    likeliest = likeliest[-len(turn.answer) :]
    if likeliest == turn.answer:
        return True
    right = [ours == label for ours, label in zip(likeliest, turn.answer, strict=True)].index(False)
    begun, answer = tokenizer.batch_decode([likeliest[: right + 1], turn.answer], skip_special_tokens=True)
    # A token may end within a character, or before white space.
    begun, answer = ("".join(text.split()).rstrip("\ufffd") for text in (begun, answer))
    return None if answer.startswith(begun) else False


@dataclass
class Evaluator:
    """Measures a prefix on the held-out rows and prints the figures; after the run, shows answers to a few of them.

    tokenized: the held-out rows; None: no evaluation is ever due. template: in which they are written. every: steps between
    evaluations; None: one at the end of each epoch. wants_answers: also answer the questions. patience: the run ends after
    this many evaluations without a lower loss; None: it does not. keep_best: the weights with the lowest loss are kept.
    distillation: its loss is measured, in place of the base's own. teacher_answered: rows had no answers, and have its own.
    """

    base: PackedModel
    tokenizer: PreTrainedTokenizerBase
    tokenized: Dataset | None
    max_tokens: int  # of one forward pass of training
    total_steps: int
    template: Template = None
    every: int | None = None
    wants_answers: bool = False
    patience: int | None = None
    keep_best: bool = False
    distillation: Distillation | None = None
    teacher_answered: bool = False

    def due(self, state) -> bool:
        """Whether to evaluate the prefix now. state: the TrainingState of the run.

        The last step is evaluated after its prefix is saved (training/run.py).
        """
        progress = state.progress
        interval_ends = progress.step % self.every == 0 if self.every else progress.row == 0
        return interval_ends and 0 < progress.step < self.total_steps and self.pending(state)

    def pending(self, state) -> bool:
        """Whether there are held-out rows, and the prefix of this step is not yet evaluated on them."""
        return self.tokenized is not None and state.progress.evaluated_step != state.progress.step

    def out_of_patience(self, state) -> bool:
        return self.patience is not None and state.progress.evaluations_since_best >= self.patience

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match. All ranks call this together.

        In a distillation, eval_loss is the divergence from the teacher, which has no perplexity. prefix: (layers, 2,
        heads, tokens, head_dim); None: the frozen base alone.
        """
        loss, match = self._measure(self.distillation or self.base, prefix)
        figures, line = {"eval_loss": loss}, f"{title}: eval loss {loss:.4f}"
        if self.distillation:
            line += " (divergence from the teacher)"
        else:
            figures["eval_perplexity"] = perplexity(loss)
            line += f", perplexity {figures['eval_perplexity']:.2f}"
        if self.wants_answers:
            figures["eval_exact_match"] = match
            line += f", exact match {match:.1%} of {len(self.tokenized or ())} held-out questions"
        tqdm.write(line)
        return figures

    def _measure(self, objective: Objective, prefix: torch.Tensor | None) -> tuple[float, float]:
        """The mean loss of the held-out rows, and the share of answers that match; 0 if no answers are wanted."""
        assert self.tokenized is not None
        if not self.wants_answers:
            return evaluate_rows(objective, self.tokenized, prefix, self.max_tokens)[0], 0.0
        turns = list(self._turns())

        def verdict(row: int, likeliest: list[int]) -> bool | None:
            return foreseen_match(self.tokenizer, turns[row], likeliest)

        loss, known = evaluate_rows(objective, self.tokenized, prefix, self.max_tokens, verdict)
        unsure = [turn for turn, match in zip(turns, known, strict=True) if match is None]
        right = known.count(True) + matching(self._answers(unsure, prefix), expected_answers(self.tokenizer, unsure))
        return loss, right / len(turns)

    def of_teacher(self) -> dict[str, float]:
        """teacher_exact_match, which the prefix of a distillation is to reach. Empty without a teacher, if no answers are
        wanted, or if the teacher wrote them. All ranks call this together.
        """
        if not self.distillation or not self.wants_answers or self.teacher_answered:
            return {}
        _, match = self._measure(self.base, self.distillation.teacher)
        tqdm.write(f"teacher: exact match {match:.1%}")
        return {"teacher_exact_match": match}

    def _turns(self) -> Iterator[Turn]:
        """The questions of the held-out rows."""
        return (last_turn(take(self.tokenized, [row])[0]) for row in range(len(self.tokenized or ())))

    def _answers(self, turns: list[Turn], prefix: torch.Tensor | None) -> list[str]:
        return answer_turns(self._prefixed, self.tokenizer, turns, prefix, self.max_tokens)

    @functools.cached_property
    def _prefixed(self) -> PrefixBloom:
        return greedy(self.base, self.tokenizer)

    def show_answers(self, prefix: torch.Tensor) -> None:
        """Prints the first held-out questions with short expected answers, and how the frozen base and the prefix answer
        them. All ranks call this together.
        """
        short = (turn for turn in self._turns() if len(turn.answer) <= LONGEST_SHOWN)
        turns = list(itertools.islice(short, SHOWN_ANSWERS))
        if not turns:
            return
        questions = [question_of(self.tokenizer, turn.prompt, self.template) for turn in turns]
        expected = expected_answers(self.tokenizer, turns)
        base, tuned = (self._answers(turns, pairs) for pairs in (None, prefix))
        for question, by_base, by_prefix, answer in zip(questions, base, tuned, expected, strict=True):
            texts = {"question": question, "frozen base": by_base, "with prefix": by_prefix, "expected": answer}
            for title, text in texts.items():
                print(f"  {title:12s} {shorten(text, 80)}")
            print()
