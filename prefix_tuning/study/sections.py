"""The page of a study: its sections in order, made from the numbers of run.py. Its texts are in texts.json."""

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from prefix_tuning.study import findings, plots
from prefix_tuning.study.page import Section, Text, joined
from prefix_tuning.study.plot_style import short_name
from prefix_tuning.study.texts import say

# Bytes: the page takes 6 MB at most, and plotly.js takes 4.8 of them. Of the ROOM that is left, each prefix takes
# OF_A_PREFIX for most of its pictures. Those that grow with rows and base, distances and questions, share the rest.
ROOM, OF_A_PREFIX, DISTANCE_SHARE, QUESTION_SHARE = 1_000_000, 60_000, 0.4, 0.6


def summary(numbers: dict) -> Text:
    """What was studied, on how many rows."""
    each = []
    for name, prefix in numbers["prefixes"].items():
        cut = say("prefix.cut", rows_cut=prefix["rows_cut"]) if prefix["rows_cut"] else Text("", "")
        each.append(say("prefix", name=name, cut=cut, **prefix))
    return say("summary", base=numbers["base"], precision=numbers["precision"], prefixes=joined(each, "、"))


def sections_of(numbers: dict) -> list[Section]:
    """numbers: from `run.measure_prefixes`."""
    prefixes = numbers["prefixes"]
    maps, boxes = _drawn(plots.share_map, prefixes, "attention"), _drawn(plots.norm_boxes, prefixes, "norms")
    return [
        _about_alibi("attention", maps, _found(findings.attention, prefixes), prefixes),
        _distance(prefixes),
        _question(prefixes),
        _removal(prefixes),
        _pairs(numbers["pairs"], prefixes),
        _quiz(numbers["quiz"]),
        _growth(prefixes),
        _about_alibi("norms", boxes, _found(findings.norms, prefixes), prefixes),
        _words(prefixes),
    ]


def _section(
    key: str,
    drawn: Sequence[go.Figure | tuple[go.Figure, ...]],
    found: Sequence[Text],
    notes: Sequence[Text] = (),
    **values: object,
) -> Section:
    return Section(say(key), say(f"{key}.reading", **values), drawn, notes=notes, found=found)


def _about_alibi(
    key: str,
    drawn: Sequence[go.Figure | tuple[go.Figure, ...]],
    found: Sequence[Text],
    prefixes: dict,
    notes: Sequence[Text] = (),
    **values: object,
) -> Section:
    """A section that reads differently if the model has no ALiBi."""
    slopes = next(iter(prefixes.values()))["attention"]["slopes"]
    reading = say(f"{key}.reading" if slopes else f"{key}.reading.no_alibi", **values)
    return Section(say(key), reading, drawn, notes=notes, found=found)


def _drawn(draw: Callable[[dict, str], Any], prefixes: dict, key: str) -> list[Any]:
    """The pictures of each prefix that has the numbers."""
    return [draw(one[key], short_name(name)) for name, one in prefixes.items() if one[key]]


def _found(find: Callable[[str, dict], Text], prefixes: dict) -> list[Text]:
    return [find(name, one) for name, one in prefixes.items()]


def _left_out(key: str, count: int) -> list[Text]:
    """A note if something was left out."""
    return [say(f"left_out.{key}", count=count)] if count > 0 else []


def share_out(share: float, prefixes: int, fixed: float, each: float, most: int) -> tuple[int, int]:
    """How many prefixes are drawn, and how many items (layers, heads) of each, within a share of the page.

    A prefix takes `fixed` bytes, and `each` bytes for each of its items. It has `most` items. One item of one prefix is
    always drawn.
    """
    budget = share * (ROOM - OF_A_PREFIX * prefixes)
    drawn = max(1, min(prefixes, int(budget // (fixed + each))))
    return drawn, max(1, min(most, int((budget / drawn - fixed) // each)))


def _distance(prefixes: dict) -> Section:
    shares = [prefix["attention"] for prefix in prefixes.values()]
    layers, heads = len(shares[0]["share"]), len(shares[0]["share"][0])
    line = 250 + 5.4 * max(len(one["by_distance"][0][0]) for one in shares)  # 4-byte numbers in base64
    drawn, count = share_out(DISTANCE_SHARE, len(prefixes), heads * line, heads * line, layers)
    chosen = [number * layers // count for number in range(count)]
    pairs = zip(shares[:drawn], prefixes, strict=False)
    pictures = [plots.share_by_distance(one, short_name(name), chosen) for one, name in pairs]
    notes = _left_out("prefixes", len(prefixes) - drawn) + _left_out("layers", layers - count)
    farther = max(prefix["num_virtual_tokens"] for prefix in prefixes.values()) - 1
    return _about_alibi("distance", pictures, _found(findings.distance, prefixes), prefixes, notes, farther=farther)


def _question(prefixes: dict) -> Section:
    questions = {name: prefix["question"] for name, prefix in prefixes.items()}
    tokens = max(len(one["tokens"]) for one in questions.values())
    longest = max(prefix["num_virtual_tokens"] for prefix in prefixes.values())
    weights = 400 + 1.4 * tokens * longest  # a byte each, in base64
    heads = max(len(one["attention"]) for one in questions.values())
    drawn, count = share_out(QUESTION_SHARE, len(prefixes), 300 * tokens, weights, heads)
    pictures, notes = [], []
    for number, (name, one) in enumerate(questions.items()):
        if number < drawn:
            pictures.append(plots.question_map(one, short_name(name), count))
        answers = {"base": one["answers"]["base"], "answer": one["answers"]["prefix"]}
        notes.append(say("question.answers", name=name, question=one["question"], **answers))
    every = sum(map(len, next(iter(prefixes.values()))["attention"]["share"]))
    notes += _left_out("prefixes", len(prefixes) - drawn) + _left_out("maps", every - count)
    return _section("question", pictures, _found(findings.question, prefixes), notes)


def _removal(prefixes: dict) -> Section:
    removals = {name: prefix["removal"] for name, prefix in prefixes.items()}
    drawn = [plots.removal_bars(one, short_name(name), prefixes[name]["rows"]) for name, one in removals.items()]
    notes = [
        say("removal.whole", name=name, rows=prefixes[name]["rows"], row=1 / prefixes[name]["rows"], **one)
        for name, one in removals.items()
    ]
    first = next(iter(prefixes.values()))
    if (group := len(first["attention"]["share"][0]) // first["key_value_heads"]) > 1:
        notes.append(say("removal.grouped", group=group))
    notes += _left_out("heads", max(one["left_out"] for one in removals.values()))
    notes += _left_out("bars", max(len(one["parts"]) - plots.MOST_BARS for one in removals.values()))
    return _section("removal", drawn, _found(findings.removal, prefixes), notes)


def _pairs(pairs: list[dict], prefixes: dict) -> Section:
    if not pairs:
        return Section(say("pairs"), say("pairs.none"))
    drawn: list[go.Figure | tuple[go.Figure, ...]] = []
    notes = []
    for pair in pairs:
        named = pair | {side: short_name(pair[side]) for side in ("first", "second")}
        drawn.append(plots.combination_bars(named))
        if pair["between"]:
            drawn += [plots.between_lines(named), plots.cosine_bars(named)]
        else:
            notes.append(say("pairs.lengths", first=pair["first"], second=pair["second"]))
    notes += [say("pairs.first")] if len(pairs) > 1 else []
    return _section("pairs", drawn, [findings.pair(one, prefixes) for one in pairs], notes)


def _quiz(quiz: dict | None) -> Section:
    if quiz is None:
        return Section(say("quiz"), say("quiz.none"))
    return _section("quiz", [plots.quiz_bars(quiz["right"])], [findings.quiz(quiz)], **quiz)


def _growth(prefixes: dict) -> Section:
    grown = {name: one for name, one in prefixes.items() if one["growth"]}
    missing = ", ".join(name for name in prefixes if name not in grown)
    notes = [say("growth.none", names=missing)] if missing else []
    notes += _left_out("checkpoints", max((one["growth"]["left_out"] for one in grown.values()), default=0))
    return _section("growth", _drawn(plots.growth_lines, prefixes, "growth"), _found(findings.growth, grown), notes)


def _words(prefixes: dict) -> Section:
    as_pairs = next(iter(prefixes.values()))["nearest_words"][0]["unexplained"] is None
    way, columns = (".pairs" if as_pairs else ""), ["prefix", "token", "nearest"]
    columns += [] if as_pairs else ["unexplained"]
    table: list[list[str | Text]] = [[say(f"words.{key}") for key in columns]]
    for name, prefix in prefixes.items():
        for token, one in enumerate(prefix["nearest_words"]):
            words = ", ".join(f"{text!r} {cosine:.2f}" for text, cosine in one["words"])
            table.append([name, str(token), words] + ([] if as_pairs else [f"{one['unexplained']:.0%}"]))
    found, notes = _found(findings.words, prefixes), [say(f"words.warning{way}")]
    return Section(say("words"), say(f"words.reading{way}"), table=table, notes=notes, found=found)
