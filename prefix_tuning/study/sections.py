"""The page of a study: its parts in their order, made of the numbers of run.py. What it says stands in texts.json."""

import json
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from prefix_tuning.generation.prefix_bloom import BASE
from prefix_tuning.study import figures
from prefix_tuning.study.page import Section, Text

TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text("utf-8"))


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
    parts = [
        _section("attention", _drawn(figures.share_map, prefixes, "attention")),
        _section("distance", _drawn(figures.share_by_distance, prefixes, "attention")),
        _question(prefixes),
        _removal(prefixes),
        *([_pairs(numbers["pairs"])] if numbers["pairs"] else []),
        _quiz(numbers["quiz"]),
        _growth(prefixes),
        _section("norms", _drawn(figures.norm_boxes, prefixes, "norms")),
        _words(prefixes),
    ]
    return parts


def _section(key: str, drawn: list[go.Figure], notes: list[Text] | None = None, **values: object) -> Section:
    return Section(say(key), say(f"{key}.reading", **values), drawn, notes=notes or [])


def _drawn(draw: Callable[[dict, str], go.Figure], prefixes: dict, key: str) -> list[go.Figure]:
    return [draw(one[key], name) for name, one in prefixes.items()]


def _left_out(key: str, count: int) -> list[Text]:
    """A note if something was left out."""
    return [say(f"left_out.{key}", count=count)] if count else []


def _question(prefixes: dict) -> Section:
    drawn, notes = [], []
    for name, prefix in prefixes.items():
        one = prefix["question"]
        drawn += [figures.next_tokens(one, name), figures.question_attention(one, name)]
        answers = {"base": one["answers"][BASE], "answer": one["answers"][name]}
        notes.append(say("question.answers", name=name, question=one["question"], **answers))
    return _section("question", drawn, notes + _left_out("maps", one["left_out"]))


def _removal(prefixes: dict) -> Section:
    removals = {name: prefix["removal"] for name, prefix in prefixes.items()}
    notes = [say("removal.whole", name=name, **one) for name, one in removals.items()]
    notes += _left_out("heads", max(one["left_out"] for one in removals.values()))
    notes += _left_out("bars", figures.MOST_BARS * any(len(one["parts"]) > figures.MOST_BARS for one in removals.values()))
    return _section("removal", _drawn(figures.removal_bars, prefixes, "removal"), notes)


def _pairs(pairs: list[dict]) -> Section:
    drawn, notes = [], []
    for pair in pairs:
        drawn.append(figures.combination_bars(pair))
        if pair["between"]:
            drawn += [figures.between_lines(pair), figures.cosine_lines(pair)]
        else:
            notes.append(say("pairs.lengths", first=pair["first"], second=pair["second"]))
    return _section("pairs", drawn, notes + ([say("pairs.first")] if len(pairs) > 1 else []))


def _quiz(quiz: dict | None) -> Section:
    if quiz is None:
        return Section(say("quiz"), say("quiz.none"))
    return _section("quiz", [figures.quiz_bars(quiz["right"])], questions=quiz["questions"])


def _growth(prefixes: dict) -> Section:
    found = {name: one["growth"] for name, one in prefixes.items() if one["growth"]}
    missing = ", ".join(name for name in prefixes if name not in found)
    notes = [say("growth.none", names=missing)] if missing else []
    notes += _left_out("checkpoints", max((one["left_out"] for one in found.values()), default=0))
    return _section("growth", [figures.growth_lines(one, name) for name, one in found.items()], notes)


def _words(prefixes: dict) -> Section:
    table: list[list[str | Text]] = [[say(f"words.{key}") for key in ("prefix", "token", "nearest", "unexplained")]]
    for name, prefix in prefixes.items():
        for place, one in enumerate(prefix["nearest_words"]):
            words = ", ".join(f"{text!r} {cosine:.2f}" for text, cosine in one["words"])
            table.append([name, str(place), words, f"{one['unexplained']:.0%}"])
    return Section(say("words"), say("words.reading"), table=table, notes=[say("words.warning")])
