"""The page of a study: its parts in their order, made of the numbers of run.py. What it says stands in texts.json."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from prefix_tuning.study import figures
from prefix_tuning.study.page import Section, Text
from prefix_tuning.study.plotting import short_name

TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text("utf-8"))
# Bytes. plotly.js takes 4.8 of the page's 6 MB; what the pictures of a prefix take that do not grow with rows and base is
# subtracted from the rest, of which each of the two others gets a share.
ROOM, OF_A_PREFIX, DISTANCE_SHARE, QUESTION_SHARE = 1_000_000, 55_000, 0.4, 0.6


def say(key: str, **values: object) -> Text:
    """A text of texts.json with its {fields} filled in; a value that is a Text is so in its language."""

    def of(language: str) -> str:
        filled = {name: getattr(value, language) if isinstance(value, Text) else value for name, value in values.items()}
        return TEXTS[key][language].format(**filled)

    return Text(of("zh"), of("en"))


def summary(numbers: dict) -> Text:
    """What was studied, on how many rows."""
    each = [say("prefix", name=name, **prefix) for name, prefix in numbers["prefixes"].items()]
    prefixes = Text("、".join(text.zh for text in each), ", ".join(text.en for text in each))
    return say("summary", base=numbers["base"], precision=numbers["precision"], prefixes=prefixes)


def sections_of(numbers: dict) -> list[Section]:
    """numbers: of `run.measure`."""
    prefixes = numbers["prefixes"]
    return [
        _section("attention", _drawn(figures.share_map, prefixes, "attention")),
        _distance(prefixes),
        _question(prefixes),
        _removal(prefixes),
        _pairs(numbers["pairs"]),
        _quiz(numbers["quiz"]),
        _growth(prefixes),
        _section("norms", _drawn(figures.norm_boxes, prefixes, "norms")),
        _words(prefixes),
    ]


def _section(key: str, drawn: list[go.Figure], notes: Sequence[Text] = (), **values: object) -> Section:
    return Section(say(key), say(f"{key}.reading", **values), drawn, notes=notes)


def _drawn(draw: Callable[[dict, str], go.Figure], prefixes: dict, key: str) -> list[go.Figure]:
    """A picture of each prefix, for which it has the numbers."""
    return [draw(one[key], short_name(name)) for name, one in prefixes.items() if one[key]]


def _left_out(key: str, count: int) -> list[Text]:
    """A note if something was left out."""
    return [say(f"left_out.{key}", count=count)] if count > 0 else []


def share_out(share: float, prefixes: int, fixed: float, each: float, most: int) -> tuple[int, int]:
    """How many prefixes are drawn, and how many items (layers, heads) of each, within a share of the page.

    A prefix takes `fixed` bytes and, for every item, of which there are `most`, `each`. One item of one prefix is always
    drawn.
    """
    budget = share * (ROOM - OF_A_PREFIX * prefixes)
    drawn = max(1, min(prefixes, int(budget // (fixed + each))))
    return drawn, max(1, min(most, int((budget / drawn - fixed) // each)))


def _distance(prefixes: dict) -> Section:
    shares = [prefix["attention"] for prefix in prefixes.values()]
    layers, heads = len(shares[0]["share"]), len(shares[0]["slopes"])
    line = 250 + 5.4 * max(len(one["by_distance"][0][0]) for one in shares)  # 4-byte numbers in base64
    drawn, count = share_out(DISTANCE_SHARE, len(prefixes), heads * line, heads * line, layers)
    chosen = [place * layers // count for place in range(count)]
    pairs = zip(shares[:drawn], prefixes, strict=False)
    pictures = [figures.share_by_distance(one, short_name(name), chosen) for one, name in pairs]
    return _section("distance", pictures, _left_out("prefixes", len(prefixes) - drawn) + _left_out("layers", layers - count))


def _question(prefixes: dict) -> Section:
    questions = {name: prefix["question"] for name, prefix in prefixes.items()}
    tokens = max(len(one["tokens"]) for one in questions.values())
    longest = max(prefix["num_virtual_tokens"] for prefix in prefixes.values())
    weights = 400 + 1.4 * tokens * longest  # a byte each, in base64
    heads = max(len(one["attention"]) for one in questions.values())
    drawn, count = share_out(QUESTION_SHARE, len(prefixes), 300 * tokens, weights, heads)
    pictures, notes = [], []
    for place, (name, one) in enumerate(questions.items()):
        if place < drawn:
            pictures += [
                figures.next_tokens(one, short_name(name)),
                figures.question_attention(one, short_name(name), count),
            ]
        answers = {"base": one["answers"]["base"], "answer": one["answers"]["prefix"]}
        notes.append(say("question.answers", name=name, question=one["question"], **answers))
    every = sum(map(len, next(iter(prefixes.values()))["attention"]["share"]))
    notes += _left_out("prefixes", len(prefixes) - drawn) + _left_out("maps", every - count)
    return _section("question", pictures, notes)


def _removal(prefixes: dict) -> Section:
    removals = {name: prefix["removal"] for name, prefix in prefixes.items()}
    notes = [say("removal.whole", name=name, **one) for name, one in removals.items()]
    notes += _left_out("heads", max(one["left_out"] for one in removals.values()))
    notes += _left_out("bars", max(len(one["parts"]) - figures.MOST_BARS for one in removals.values()))
    return _section("removal", _drawn(figures.removal_bars, prefixes, "removal"), notes)


def _pairs(pairs: list[dict]) -> Section:
    if not pairs:
        return Section(say("pairs"), say("pairs.none"))
    drawn, notes = [], []
    for pair in pairs:
        named = pair | {side: short_name(pair[side]) for side in ("first", "second")}
        drawn.append(figures.combination_bars(named))
        if pair["between"]:
            drawn += [figures.between_lines(named), figures.cosine_bars(named)]
        else:
            notes.append(say("pairs.lengths", first=pair["first"], second=pair["second"]))
    return _section("pairs", drawn, notes + ([say("pairs.first")] if len(pairs) > 1 else []))


def _quiz(quiz: dict | None) -> Section:
    if quiz is None:
        return Section(say("quiz"), say("quiz.none"))
    return _section("quiz", [figures.quiz_bars(quiz["right"])], questions=quiz["questions"])


def _growth(prefixes: dict) -> Section:
    found = [one["growth"] for one in prefixes.values() if one["growth"]]
    missing = ", ".join(name for name, one in prefixes.items() if not one["growth"])
    notes = [say("growth.none", names=missing)] if missing else []
    notes += _left_out("checkpoints", max((one["left_out"] for one in found), default=0))
    return _section("growth", _drawn(figures.growth_lines, prefixes, "growth"), notes)


def _words(prefixes: dict) -> Section:
    table: list[list[str | Text]] = [[say(f"words.{key}") for key in ("prefix", "token", "nearest", "unexplained")]]
    for name, prefix in prefixes.items():
        for place, one in enumerate(prefix["nearest_words"]):
            words = ", ".join(f"{text!r} {cosine:.2f}" for text, cosine in one["words"])
            table.append([name, str(place), words, f"{one['unexplained']:.0%}"])
    return Section(say("words"), say("words.reading"), table=table, notes=[say("words.warning")])
