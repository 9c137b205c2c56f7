"""EVAL"""

import functools

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning.base_model.sharding import is_sharded
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.evaluation import answer_rows, evaluate_loss, exact_match
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.text import shorten
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.metrics import MetricsFile
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Progress, TrainingState


def evaluation_due(config: TrainConfig, progress: Progress, total_steps: int) -> bool:
    """Whether the prefix is to be evaluated as it stands. That of the last step is, but once it is saved (`finish`)."""
    step = progress.step
    interval_ends = step % config.eval_steps == 0 if config.eval_steps else progress.row == 0
    return interval_ends and 0 < step < total_steps and progress.evaluated_step != step


def evaluate(
    config: TrainConfig, state: TrainingState, evaluator: "Evaluator", metrics: MetricsFile, checkpoints: "Checkpoints"
) -> None:
    """Evaluates the prefix as it stands. If that is cut short, a checkpoint is there, from which a run evaluates again."""
    step = state.progress.step
    with checkpoints.saved_if_left(state, metrics):
        figures = evaluator(state.encoder.bake(), f"step {step}")
    metrics.write({"step": step, **figures})
    state.note_evaluation(figures["eval_loss"], config.save_best)


class Evaluator:
    """Measures a prefix on the held-out rows, prints the figures, and keeps some answers to show before and after."""

    SHOWN = 5

    def __init__(
        self,
        config: TrainConfig,
        model: BloomForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        tokenized: Dataset,
    ):
        self.model, self.tokenizer, self.rows, self.tokenized = model, tokenizer, rows, tokenized
        self.answers_wanted = config.eval_exact_match
        self.max_tokens = config.max_tokens_per_batch or suggested_max_tokens(model, is_sharded(model))
        self.answers: dict[str, list[str]] = {}

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match."""
        figures = evaluate_loss(self.model, self.tokenized, prefix, self.max_tokens)
        line = f"{title}: eval loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}"
        if self.answers_wanted:
            answers = answer_rows(self.prefixed, self.tokenizer, self.rows, prefix)
            self.answers["frozen base" if prefix is None else "with prefix"] = answers
            figures["eval_exact_match"] = exact_match(answers, self.rows)
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(self.rows)} held-out questions"
        tqdm.write(line)
        return figures

    @functools.cached_property
    def prefixed(self) -> PrefixBloom:
        return PrefixBloom(self.model)

    def show_answers(self) -> None:
        """Prints a handful of questions with the answers of the frozen base, if this run asked it, and the last ones."""
        if not self.answers:
            return
        for index in range(min(self.SHOWN, len(self.rows))):
            row = self.rows[index]
            texts = {"question": f"{row['instruction']} {row['input']}"}
            texts |= {title: answers[index] for title, answers in self.answers.items()}
            for title, text in (texts | {"expected": row["output"]}).items():
                print(f"  {title:12s} {shorten(text, 80)}")
            print()
