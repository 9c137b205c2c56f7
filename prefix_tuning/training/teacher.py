"""Where the teacher of a distillation comes from: a text, or a longer prefix of the same base. And what it answers.

A teacher is pairs alone, keys and values for every layer (model/distillation.py has the loss). A saved prefix has them in
its file. For a text, the base computes them once: reading S tokens leaves S pairs, and to attend to them is to have the text
in front. A text longer than a pass is read in pieces, each of which attends to the pairs of the pieces before it.

Positions. A row behind its text continues the text's positions, so the teacher is exactly the base with the text in front. A
prefix of P < S pairs stands right before the row, wherever in the text its start was taken from. ALiBi knows no position of
a key but the index of its pair, so of P pairs at even steps it keeps the order and shrinks S positions to P. RoPE has turned
each key by its position already, so their order in the prefix means nothing. The text is therefore read at positions that
end at P - 1, right before the row, and begin below 0: R(a) q . R(b) k depends on a - b alone, and each pair that is kept
stays as far from the row as it was. The first P pairs are, in both, those of a text that ends there: S - P positions nearer.

What untrained pairs lose, measured as divergence from the teacher (tests/benchmarks/positions.py): a text of 192 tokens,
sentences of the demo, before 200 held-out questions; means of three texts, in nats per label.

                                                         mini-bloom (ALiBi)    mini-qwen3 (RoPE)
    no pair                                              0.71                  1.16
    all 192 pairs, in a random order                     0.12                  0.00
    the first 96                                         0.30                  0.85
    96 at even steps                                     0.11                  0.39
    the same, at their true distances (ALiBi)            0.12
    the same, at positions that begin at 0 (RoPE)                              1.41
    the first 24                                         0.48                  0.99
    24 at even steps                                     0.31                  0.98

So to a base with ALiBi the order is worth a sixth of the text, and the distances nothing. With RoPE, keys whose positions
come after the row's are worse than no text at all.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import DynamicCache, PreTrainedTokenizerBase

from prefix_tuning import bundled, distributed
from prefix_tuning.base_model.identity import check_base, portable_name
from prefix_tuning.data.readers import read_text
from prefix_tuning.data.rows import ASKED, digest
from prefix_tuning.data.templates import Template, beginning_of_text, note_other_template, prompt_ids, talk_of
from prefix_tuning.errors import UserError
from prefix_tuning.evaluation import answer_prompts, greedy
from prefix_tuning.files.names import ANSWERS_FILE
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.bloom import PackedModel, cached_pairs
from prefix_tuning.model.decoder import Decoder
from prefix_tuning.training.settings import TrainConfig


class Teacher(NamedTuple):
    """The teacher's pairs, (layers, 2, heads, tokens, head_dim), on the device of the base.

    text_ids: the tokens that the pairs come from; empty for a saved prefix. record: what files tell about the teacher, as
    JSON: its kind, text or prefix; its name; its number of tokens; and sha256, a hash over the text or the pairs.
    """

    pairs: torch.Tensor
    text_ids: list[int]
    record: dict[str, Any]


def find_teacher(
    config: TrainConfig,
    base: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: dict[str, Any],
    template: dict[str, Any] | None,
    max_tokens: int,
) -> Teacher | None:
    """The teacher that train.py's flags name; None if they name none. See the two functions below."""
    if config.distill_text:
        return text_teacher(config.distill_text, base, tokenizer, config.max_length, max_tokens)
    if config.distill_prefix:
        return prefix_teacher(config.distill_prefix, base, fingerprint, template, config.force)
    return None


def text_teacher(
    name: str, base: PackedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, max_tokens: int
) -> Teacher:
    """The base with a text in front. All ranks call this together.

    name: --distill_text, a UTF-8 file. max_length: of the rows that follow the text. max_tokens: of a piece. Raises
    UserError if the text is empty, cannot be read, or has too many tokens for the base.
    """
    flag = f"--distill_text {name}"
    text = read_text(flag, bundled.resolve(name))
    if not text.strip():
        raise UserError(f"{flag}: is empty; a teacher needs a text")
    ids = beginning_of_text(tokenizer) + text_tokens(tokenizer, text)
    context = getattr(base.config, "max_position_embeddings", None)
    if context and len(ids) + max_length > context:
        room = f"with rows of --max_length {max_length} that is more than the {context} positions of the base"
        raise UserError(f"{flag}: has {len(ids)} tokens; {room}; shorten the text")
    record = {"kind": "text", "name": portable_name(name), "tokens": len(ids)}
    return Teacher(read_pairs(base, ids, max_tokens), ids, record | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


def prefix_teacher(
    name: str, base: PackedModel, fingerprint: dict[str, Any], template: dict[str, Any] | None, force: bool
) -> Teacher:
    """The base with a saved prefix in front. Says so if that was trained in another template.

    name: --distill_prefix. template: of the rows, as a dict. Raises UserError if the prefix does not fit the base with this
    `fingerprint`, unless `force` allows other weights.
    """
    pairs, recorded_base = load_prefix(name)
    check_base(pairs.shape, recorded_base, fingerprint, name, force)
    note_other_template(name, recorded_base.get("template"), template)
    record = {"kind": "prefix", "name": portable_name(name), "tokens": pairs.shape[3]}
    sha256 = hashlib.sha256(pairs.contiguous().numpy().tobytes()).hexdigest()
    return Teacher(pairs.to(base.device), [], record | {"sha256": sha256})


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text. What looks like a special token is read as it is written."""
    return tokenizer(text, split_special_tokens=True, add_special_tokens=False, verbose=False).input_ids


@torch.no_grad()
def read_pairs(base: PackedModel, ids: list[int], max_tokens: int, first_position: int = 0) -> torch.Tensor:
    """The keys and values that the frozen base computes for these tokens: (layers, 2, heads, len(ids), head_dim), in its
    dtype and on its device. All ranks that share a base call this together.

    max_tokens: of one pass. first_position: of the first token, where the base has rotary positions; it may be negative.
    """
    cache = DynamicCache()
    for start in range(0, len(ids), max_tokens):
        piece = torch.tensor([ids[start : start + max_tokens]], device=base.device)
        first = first_position + start
        positions = torch.arange(first, first + piece.shape[1], device=base.device).unsqueeze(0)
        # Bloom's forward takes no positions, and needs none.
        options = {"position_ids": positions} if isinstance(base, Decoder) else {}
        # Logits of one position, because nobody reads them.
        base(piece, **{CACHE: cache}, logits_to_keep=1, **options)
    return cached_pairs(cache)


# --- answers to rows that have none ---


class Answers(NamedTuple):
    """The teacher's answers, and what they belong to: `asked` are hashes of the teacher and of the questions."""

    asked: list[Any]
    texts: list[str]

    @classmethod
    def kept_in(cls, folder: Path | None) -> "Answers | None":
        """Main reads them from the folder of the run that is resumed; None if there are none. All ranks call this."""
        try:
            found = json.loads((folder / ANSWERS_FILE).read_text("utf-8")) if folder and distributed.is_main() else None
            kept = found and [found["asked"], found["texts"]]
        except (OSError, ValueError, KeyError, TypeError):
            kept = None
        kept = distributed.broadcast_object(kept)
        return kept and cls(*kept)


def answer_rows(
    sets: Sequence[Dataset],
    teacher: Teacher,
    base: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    max_length: int,
    max_tokens: int,
    kept: Answers | None,
) -> tuple[list[Dataset], Answers]:
    """These sets of rows of `load_rows`, with the teacher's greedy answer as the output of each row that has none.

    Prompt and answer have at most max_length tokens. max_tokens: of a training pass; the prompts of a batch, and its copies
    of the teacher, each take about as much memory. kept: the answers of the run that is resumed, which are taken if they are
    to the same questions. All ranks call this together. Raises Interrupted in all of them if one gets a signal.
    """
    missing = [[index for index, output in enumerate(rows["output"]) if not output] for rows in sets]
    asked = [rows.select(indices) for rows, indices in zip(sets, missing, strict=True) if indices]
    count = sum(map(len, asked))
    answers = Answers([teacher.record["sha256"], template and [*template], max_length, *map(digest, asked)], [])
    if kept and kept.asked == answers.asked and len(kept.texts) == count:
        answers = kept
        print(f"{count:,} rows have no output: the teacher's answers are those of the run that is resumed")
    elif asked:
        print(f"the teacher answers {count:,} rows that have no output; exact match compares with its answers")
        talks = [talk_of(*values) for rows in asked for values in zip(*(rows[name] for name in ASKED), strict=True)]
        # A row whose prompt fills max_length is left out later (data/rows.py).
        prompts = [prompt[:max_length] for prompt in prompt_ids(tokenizer, talks, template)]
        # The token that ends the answer counts too.
        limits = [max(1, max_length - 1 - len(prompt)) for prompt in prompts]
        replies = answer_prompts(greedy(base, tokenizer), tokenizer, prompts, limits, teacher.pairs, max_tokens)
        # Chat templates strip an answer, or a line break at its beginning becomes a part of the prompt's last token.
        answers = answers._replace(texts=[reply.strip() for reply in replies])
    texts = iter(answers.texts)
    outputs = [{index: next(texts) for index in indices} for indices in missing]
    return [_with_outputs(rows, own) for rows, own in zip(sets, outputs, strict=True)], answers


def _with_outputs(rows: Dataset, outputs: dict[int, str]) -> Dataset:
    """The rows, with these outputs in place of their own, by index."""
    if not outputs:
        return rows

    def fill(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"output": outputs.get(index, row["output"])}

    return rows.map(fill, with_indices=True, keep_in_memory=True, desc="Adding the teacher's answers")
