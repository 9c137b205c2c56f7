import importlib.util

import pytest

from prefix_tuning.errors import UserError
from prefix_tuning.study.__main__ import parse_study_config

MISTAKES = {
    "--output study.pdf": "--output study.pdf: must end in .html",
    "--output nowhere/study.html": "--output nowhere/study.html: there is no such folder; make it, or name another",
    "--output page.html": "--output page.html: the page and a .json beside it cannot be written; name another file",
    "--output numbers.html": "--output numbers.html: the page and a .json beside it cannot be written; name another file",
    "--rows 0": "--rows must be at least 1, not 0",
    "--prefix base=a": "--prefix base=a: give it another name",
    "--prefix a/x --prefix b/x": "--prefix b/x: there is a prefix x already",
    "--columns nonsense": "--columns",
    "--shard_base": "unknown argument --shard_base",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_named(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("page.html", "numbers.json"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=MISTAKES[flags]):
        parse_study_config(flags.split()).named_prefixes()


def test_without_plotly_nothing_is_begun(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prefix-tuning\[study\]'"):
        parse_study_config([])


def test_defaults_are_the_demo_s():
    config = parse_study_config([])
    assert list(config.named_prefixes()) == ["chatbot"]
    assert (config.output, config.precision, config.rows) == ("study.html", "fp32", None)
