"""Held-out rows: when the prefix is evaluated on them during a run, and what is shown of that."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefix_tuning.data.rows import question_of, take
from prefix_tuning.evaluation import Turn, answer_turns, evaluate_loss, exact_match, expected_answers, last_turn
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.text import shorten
from prefix_tuning.training.state import TrainingState

SHOWN_ANSWERS = 5
LONGEST_SHOWN = 64  # tokens of an expected answer: longer ones take minutes on a CPU, and do not fit on a line


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
            turns = list(self._turns())
            answers = self._answers(turns, prefix)
            figures["eval_exact_match"] = exact_match(answers, expected_answers(self.tokenizer, turns))
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(answers)} held-out questions"
        tqdm.write(line)
        return figures

    def _turns(self) -> Iterator[Turn]:
        """The questions of the held-out rows."""
        return (last_turn(take(self.tokenized, [place])[0]) for place in range(len(self.tokenized or ())))

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
