"""The claims about texts that become prefixes, tried on made-up sheets that mini-reader has never seen (demo/sheets.py).

Each seed has a sheet of its own. Training rows ask about each of its facts in two forms, held-out rows in a third one. The
rate of a method is found on one more sheet.

- Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context representations via self-study",
  https://arxiv.org/abs/2506.06266
- Hardalov et al. 2026, "Cartridges at Scale: Training Modular KV Caches over Large Document Collections",
  https://arxiv.org/abs/2606.04557
"""

import functools
import random
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import FEATURES
from prefix_tuning.data.rows import tokenize
from prefix_tuning.demo.sheets import MOST, NAMES, draw_facts, questions_about, sheet_of
from prefix_tuning.model.bloom import Objective, PackedModel
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.settings import MAX_LENGTH
from prefix_tuning.study.claims.experiments import matches
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.methods import METHODS
from prefix_tuning.study.claims.record import (
    Chart,
    Finding,
    Part,
    Table,
    above,
    bars_of,
    chart_of,
    finding,
    label,
    named,
    say,
    table_of,
    training,
)
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tasks import bundled_base, load_task
from prefix_tuning.study.claims.trials import Measured, Trial, fit, sample_batches, score, search, tune
from prefix_tuning.study.page import Text, joined
from prefix_tuning.study.scoring import Score
from prefix_tuning.training.start import start_pairs
from prefix_tuning.training.teacher import read_pairs, text_tokens

CARTRIDGES = "Eyuboglu et al. 2025, arXiv 2506.06266"
RATE_SEED = 0  # of the sheet on which rates are found
TOKENS = 16  # of a prefix, where a claim is not about their number
LONG, SHORT = 64, 8  # tokens of the demo's prefixes in `shorter`
KEPT = 0.9  # of the exact match with the sheet in front, by a prefix of a TENTH of the tokens
TENTH = 10


@dataclass(frozen=True)
class Reading:
    """How a sheet becomes a prefix, apart from the seed and the rate.

    loss: divergence, from the base with the sheet in front; answers, their cross-entropy; or none, which leaves the start as
    it is. start: random, or pairs of the sheet, first or chunks. tokens: None, as many as the sheet has. projection: by the
    encoder's MLP; without it, the pairs themselves are trained, as in the papers.
    """

    loss: str
    start: str
    tokens: int | None
    projection: bool = True

    @property
    def first_rate(self) -> int:
        """The index of the rate that a search begins with."""
        return METHODS["prefix" if self.projection else "direct"].first_rate


class Sheet(NamedTuple):
    """A text and questions about it. ids: its tokens. pairs: what the base computes for them, (L, 2, H, len(ids), D)."""

    ids: list[int]
    pairs: torch.Tensor
    train: Dataset
    held_out: Dataset


@functools.cache
def reader() -> tuple[PackedModel, PreTrainedTokenizerBase]:
    """mini-reader, frozen, float32, on the CPU, and its tokenizer."""
    return load_base(bundled.READER, torch.float32, torch.device("cpu"))


@functools.cache
def sheet(seed: int, statements: int = MOST, names: tuple[str, ...] = tuple(NAMES)) -> Sheet:
    """names: the people it may be about."""
    base, tokenizer = reader()
    rng = random.Random(f"{seed} {names[0]}")
    facts = draw_facts(rng, statements, names=names)
    ids = text_tokens(tokenizer, sheet_of(rng, facts))
    train, held_out = (
        Dataset.from_list([{**row, "system": "", "history": [], "weights": []} for row in rows], features=FEATURES)
        for rows in questions_about(rng, facts)
    )
    return Sheet(
        ids, read_pairs(base, ids, len(ids)), *(tokenize(rows, tokenizer, MAX_LENGTH) for rows in (train, held_out))
    )


def learn(reading: Reading, one: Sheet, scale: Scale, rate: float, seed: int) -> torch.Tensor:
    """The prefix that the sheet becomes, (L, 2, H, tokens, D)."""
    base, _ = reader()
    torch.manual_seed(seed)
    tokens = reading.tokens or len(one.ids)
    encoder = PrefixEncoder(PrefixConfig.of(base.config, tokens, prefix_projection=reading.projection))
    if reading.start != "random":
        encoder.initialize("text", start_pairs(base, one.ids, tokens, reading.start))
    if reading.loss != "none":
        asked: Objective = Distillation(base, one.pairs) if reading.loss == "divergence" else base
        fit(asked, encoder, one.train, scale, rate, seed)
    return encoder.bake()


def score_on(rows: Dataset, prefix: torch.Tensor) -> Score:
    return score(reader()[0], sample_batches(rows, len(rows)), prefix)


def wrong(prefix: torch.Tensor) -> float:
    """How far a prefix of the sheet for rates is from the right answers: the share of wrong ones, then the loss."""
    found = score_on(sheet(RATE_SEED).held_out, prefix)
    return 1 - found.exact_match + found.loss / 1000


def measure_reading(reading: Reading, scale: Scale) -> Measured:
    """Finds the reading's rate on a sheet of its own, and scores the prefixes of the sheets of all seeds at that rate."""

    def train(rate: float, seed: int) -> torch.Tensor:
        return learn(reading, sheet(seed), scale, rate, seed)

    if reading.loss == "none":
        rate, tried, prefixes = 0.0, dict[str, float | None](), [train(0.0, seed) for seed in scale.seeds]
    else:
        rate, tried, (_, *prefixes) = search(train, wrong, reading.first_rate, [RATE_SEED, *scale.seeds])
    pairs = [(sheet(seed), prefix) for seed, prefix in zip(scale.seeds, prefixes, strict=True)]
    train_loss = [score_on(one.train, prefix).loss for one, prefix in pairs]
    held_out = [score_on(one.held_out, prefix) for one, prefix in pairs]
    return Measured(rate, tried, train_loss, *map(list, zip(*held_out, strict=True)))


def training_on_sheets(scale: Scale) -> Text:
    """How the prefixes of a claim were trained, as a sentence."""
    return say("trained.sheets", scale=scale, seeds=len(scale.seeds), statements=MOST)


def objective(lab: Lab) -> Finding:
    """Trained: prefixes by both losses, from a random start and from the sheet's first pairs.

    Agrees: the divergence has the higher exact match. Each start is compared by itself.
    """
    starts = ("random", "first")
    trials = {(start, loss): Reading(loss, start, TOKENS) for start in starts for loss in ("divergence", "answers")}
    found = lab.run_trials(trials, measure_reading)
    parts = []
    for start in starts:
        ours, theirs = found[start, "divergence"], found[start, "answers"]
        shares = {"divergence": ours.median("exact_match"), "answers": theirs.median("exact_match")}
        text = say("objective.match", start=say(f"reading.{start}"), **shares)
        parts.append(Part(text, above(ours.exact_match, theirs.exact_match)))
    names = {joined([say(f"reading.{loss}"), say(f"reading.{start}")]): one for (start, loss), one in found.items()}
    table, chart = table_of(say("loss and start"), names), bars_of(names)
    return finding("objective", CARTRIDGES, training_on_sheets(lab.scale), parts, table, [chart], tokens=TOKENS)


def text_start(lab: Lab) -> Finding:
    """Trained: prefixes by the divergence, from three starts, by the MLP and as direct pairs.

    Agrees: pairs of the text have a higher exact match than a random start. Each way is compared by itself.
    """
    starts, ways = ("random", "first", "chunks"), {True: "mlp", False: "direct"}
    trials = {(way, start): Reading("divergence", start, TOKENS, way) for way in ways for start in starts}
    found = lab.run_trials(trials, measure_reading)
    parts = []
    for way, name in ways.items():
        of_start = {start: found[way, start] for start in starts}
        agrees = [above(of_start[start].exact_match, of_start["random"].exact_match) for start in starts[1:]]
        text = say("text_start.match", way=say(f"reading.{name}"), **matches(of_start))
        parts.append(Part(text, agrees[0] if len({*agrees}) == 1 else None))
    names = {joined([say(f"reading.{start}"), say(f"reading.{ways[way]}")]): one for (way, start), one in found.items()}
    table, axis = table_of(say("start"), names), say("start")
    series = {say(f"reading.{name}"): [found[way, start] for start in starts] for way, name in ways.items()}
    chart = chart_of("exact_match", axis, [say(f"reading.{start}") for start in starts], series)
    return finding("text_start", CARTRIDGES, training_on_sheets(lab.scale), parts, table, [chart], tokens=TOKENS)


def size(lab: Lab) -> Finding:
    """Trained: prefixes of several lengths by both losses, from a random start. Compared: the sheet in front, and its first
    pairs.

    Agrees: the longest prefix of at most a tenth of the sheet's tokens keeps more than KEPT of the exact match that the
    sheet itself gives.
    """
    losses = {"divergence": "random", "answers": "random", "none": "first"}  # and where they start
    trials = {(tokens, loss): Reading(loss, start, tokens) for loss, start in losses.items() for tokens in lab.scale.kept}
    found = lab.run_trials({**trials, (None, "none"): Reading("none", "first", None)}, measure_reading)
    in_front = found.pop((None, "none"))
    length = min(len(sheet(seed).ids) for seed in lab.scale.seeds)
    tokens = max(tokens for tokens in lab.scale.kept if TENTH * tokens <= length)
    shares = {loss: found[tokens, loss].median("exact_match") for loss in losses}
    text = say("size.match", tokens=tokens, length=length, text=in_front.median("exact_match"), **shares)
    enough = above(found[tokens, "divergence"].exact_match, [KEPT * share for share in in_front.exact_match])
    parts = [Part(text, enough)]
    names = {joined([say(f"reading.{loss}"), say("count", count=tokens)]): one for (tokens, loss), one in found.items()}
    table = table_of(say("loss and tokens"), {say("reading.text"): in_front, **names})
    series = {say(f"reading.{loss}"): [found[tokens, loss] for tokens in lab.scale.kept] for loss in losses}
    series[say("reading.text")] = [in_front] * len(lab.scale.kept)
    chart = chart_of("exact_match", say("tokens"), list(lab.scale.kept), series, lines=True)
    return finding("size", CARTRIDGES, training_on_sheets(lab.scale), parts, table, [chart])


class TwoSheets(NamedTuple):
    """A job: two sheets of half the statements about different people, each learnt by itself, with one seed."""

    reading: Reading
    rate: float
    seed: int


def compose(job: TwoSheets, scale: Scale) -> dict[str, float]:
    """The exact match on the held-out questions of both sheets, by what stands in front of them.

    text: both texts. alone: the prefix of the sheet that is asked about. together: both prefixes side by side, in any order,
    since each key has been turned by its position already; the row stands farther from them than in training. near: the
    same, with all keys turned so that each is as far from the row as in training. nothing: no prefix.
    """
    base, _ = reader()
    one, other = (sheet(job.seed, MOST // 2, tuple(NAMES[half::2])) for half in range(2))
    prefixes = [learn(job.reading, each, scale, job.rate, job.seed) for each in (one, other)]
    ids, together = one.ids + other.ids, torch.cat(prefixes, dim=3)
    in_front = {
        "text": [read_pairs(base, ids, len(ids))] * 2,
        "alone": prefixes,
        "together": [together] * 2,
        "near": [turned(together, prefixes[0].shape[3])] * 2,
        "nothing": [together[:, :, :, :0]] * 2,
    }
    return {
        way: statistics.mean(
            score_on(each.held_out, pairs).exact_match for each, pairs in zip((one, other), both, strict=True)
        )
        for way, both in in_front.items()
    }


def turned(prefix: torch.Tensor, positions: int) -> torch.Tensor:
    """The prefix with its keys turned by RoPE as if each stood that many positions later."""
    base, _ = reader()
    cos, sin = base.model.rotary_emb(prefix, torch.tensor([[positions]]))
    keys, values = prefix.unbind(1)
    return torch.stack((keys * cos + rotate_half(keys) * sin, values), dim=1)


def composed(lab: Lab) -> Finding:
    """Trained: a prefix for each of two sheets. Compared: each alone, both side by side, and no prefix.

    Agrees: side by side, they answer less than the middle between no prefix and each alone. With keys turned near, too.
    """
    reading = Reading("divergence", "random", TOKENS)
    (rate,) = (one.rate for one in lab.run_trials({"": reading}, measure_reading).values())
    results = lab.run(compose, [TwoSheets(reading, rate, seed) for seed in lab.scale.seeds])
    ways = ("text", "alone", "together", "near", "nothing")
    middle = {way: statistics.median(one[way] for one in results) for way in ways}
    halfway = [(one["alone"] + one["nothing"]) / 2 for one in results]
    parts = [
        Part(say(f"composed.{way}.found", share=middle[way], **middle), above(halfway, [one[way] for one in results]))
        for way in ("together", "near")
    ]
    table: Table = [[say("in front"), say("exact_match"), say("each_seed")]]
    table += [
        [say(f"composed.{way}"), f"{middle[way]:.1%}", ", ".join(f"{one[way]:.1%}" for one in results)] for way in ways
    ]
    ticks, shares = [label(say(f"composed.{way}")) for way in ways], {label(say("exact_match")): [*middle.values()]}
    chart = Chart("bar", label(say("in front")), label(say("axis.exact_match")), ticks, shares)
    source = "Hardalov et al. 2026, arXiv 2606.04557"
    return finding("composed", source, training_on_sheets(lab.scale), parts, table, [chart], tokens=TOKENS)


@dataclass(frozen=True)
class Shorter:
    """A prefix of `tokens` tokens that learns from one of `teacher_tokens`, which was trained at teacher_rate."""

    tokens: int
    teacher_tokens: int
    teacher_rate: float


@functools.cache
def long_prefix(tokens: int, rate: float, seed: int, scale: Scale) -> torch.Tensor:
    """A prefix of the demo's questions, (L, 2, H, tokens, D)."""
    return tune(Trial("prefix", tokens=tokens), scale, rate, seed).encoder.bake()


def measure_shorter(job: Shorter, scale: Scale) -> Measured:
    """Finds its rate as `measure` does, and scores it on the demo's questions. Each seed has a teacher of its own."""
    base, task = bundled_base()[0], load_task("short")
    validation = sample_batches(task.validation, scale.scored // 2)

    def train(rate: float, seed: int) -> torch.Tensor:
        teacher = long_prefix(job.teacher_tokens, job.teacher_rate, seed, scale)
        torch.manual_seed(seed)
        encoder = PrefixEncoder(PrefixConfig.of(base.config, job.tokens))
        fit(Distillation(base, teacher), encoder, task.train, scale, rate, seed)
        return encoder.bake()

    first_rate = METHODS["prefix"].first_rate
    rate, tried, prefixes = search(train, lambda prefix: score(base, validation, prefix).loss, first_rate, scale.seeds)
    train_rows, held_out = (sample_batches(rows, scale.scored) for rows in (task.train, task.held_out))
    train_loss = [score(base, train_rows, prefix).loss for prefix in prefixes]
    scores = [score(base, held_out, prefix) for prefix in prefixes]
    return Measured(rate, tried, train_loss, *map(list, zip(*scores, strict=True)))


def shorter(lab: Lab) -> Finding:
    """Trained: a long prefix, a short one that learns from it, and a short one from the answers. No verdict: the question is
    ours.
    """
    found = lab.run_trials({"long": Trial("prefix", tokens=LONG), "direct": Trial("prefix", tokens=SHORT)})
    found |= lab.run_trials({"distilled": Shorter(SHORT, LONG, found["long"].rate)}, measure_shorter)
    parts = [Part(say("shorter.match", long_tokens=LONG, tokens=SHORT, **matches(found)), None)]
    table, chart = table_of(say("prefix"), named("shorter", found)), bars_of(named("shorter", found), "prefix")
    return finding("shorter", CARTRIDGES, training(lab.scale), parts, table, [chart])
