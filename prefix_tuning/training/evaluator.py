"""Held-out rows: when the prefix is evaluated on them during a run, and what is shown of that."""

import functools
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefix_tuning.evaluation import answer_rows, evaluate_loss, exact_match
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.text import shorten
from prefix_tuning.training.state import TrainingState

SHOWN_ANSWERS = 5


@dataclass
class Evaluator:
    """Measures a prefix on the held-out rows, prints the figures, and keeps the answers to show them after the run.

    rows, tokenized: the held-out rows and their tokens; None: there are none, and no evaluation is ever due. every: steps
    between evaluations; None: one at the end of each epoch. wants_answers: also answer the questions. patience: evaluations
    without a lower loss that end the run; None: none do. keep_best: the weights with the lowest loss are kept.
    """

    base: Bloom
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | None
    tokenized: Dataset | None
    max_tokens: int  # of one forward pass
    total_steps: int
    every: int | None = None
    wants_answers: bool = False
    patience: int | None = None
    keep_best: bool = False
    answers: dict[str, list[str]] = field(default_factory=dict)

    def due(self, state: TrainingState) -> bool:
        """Whether to evaluate the prefix now. That of the last step is evaluated once it is saved (run.py)."""
        progress = state.progress
        interval_ends = progress.step % self.every == 0 if self.every else progress.row == 0
        return interval_ends and 0 < progress.step < self.total_steps and self.pending(state)

    def pending(self, state: TrainingState) -> bool:
        """Whether there are held-out rows on which the prefix was not evaluated at this step."""
        return self.tokenized is not None and state.progress.evaluated_step != state.progress.step

    def out_of_patience(self, state: TrainingState) -> bool:
        return self.patience is not None and state.progress.evaluations_since_best >= self.patience

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match. All ranks call this together.

        prefix: (layers, 2, heads, tokens, head_dim); None: the frozen base alone.
        """
        figures = evaluate_loss(self.base, self.tokenized, prefix, self.max_tokens)
        line = f"{title}: eval loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}"
        if self.wants_answers:
            answers = answer_rows(self._prefixed, self.tokenizer, self.rows, prefix)
            self.answers["frozen base" if prefix is None else "with prefix"] = answers
            figures["eval_exact_match"] = exact_match(answers, self.rows)
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(answers)} held-out questions"
        tqdm.write(line)
        return figures

    @functools.cached_property
    def _prefixed(self) -> PrefixBloom:
        return PrefixBloom(self.base)

    def show_answers(self) -> None:
        """Prints a handful of questions with the answers of the frozen base, if this run asked it, and the last ones."""
        if self.rows is None or not self.answers:
            return
        for index in range(min(SHOWN_ANSWERS, len(self.rows))):
            row = self.rows[index]
            texts = {"question": f"{row['instruction']} {row['input']}"}
            texts |= {title: answers[index] for title, answers in self.answers.items()}
            for title, text in (texts | {"expected": row["output"]}).items():
                print(f"  {title:12s} {shorten(text, 80)}")
            print()
