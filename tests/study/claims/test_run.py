import json

import pytest

from prefix_tuning.errors import UserError
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Finding, Part
from prefix_tuning.study.claims.run import CLAIMS, run_claims
from prefix_tuning.study.page import Text


class Killed(BaseException):
    pass


def staged_claims(calls, deadly=None):
    """Three claims that note their calls; `deadly` is where the run is killed."""

    def claim_named(name):
        def claim(lab):
            calls.append(name)
            if name == deadly:
                raise Killed
            text = Text(name, name)
            return Finding(text, "Someone 2020", text, text, [Part(text, True)], [["head"], [name]])

        return claim

    return {name: claim_named(name) for name in ("first", "second", "third")}


def test_a_killed_run_loses_nothing(tiny, tmp_path, capsys):
    page, calls = tmp_path / "claims.html", []
    with pytest.raises(Killed):
        run_claims(Lab(tiny), staged_claims(calls, deadly="second"), page, True)
    assert list(json.loads((tmp_path / "claims.json").read_text("utf-8"))["claims"]) == ["first"]
    assert "first" in page.read_text("utf-8")
    run_claims(Lab(tiny), staged_claims(calls), page, True)
    assert calls == ["first", "second", "second", "third"]
    assert list(json.loads((tmp_path / "claims.json").read_text("utf-8"))["claims"]) == ["first", "second", "third"]
    assert "agrees: first (Someone 2020): first (taken over from" in capsys.readouterr().out


def test_another_scale_takes_nothing_over(tiny, tmp_path):
    calls = []
    for seeds in ((1,), (1, 2)):
        lab = Lab(tiny.__class__(**vars(tiny) | {"seeds": seeds}))
        run_claims(lab, staged_claims(calls), tmp_path / "claims.html", True)
    assert calls == ["first", "second", "third"] * 2


@pytest.mark.parametrize("content", ["", "[]", '{"claims": {"first": {}}}', '{"claims": {}}'])
def test_a_file_that_is_no_record_is_left_alone(tiny, tmp_path, content):
    (tmp_path / "claims.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match="is no record of this command"):
        run_claims(Lab(tiny), staged_claims([]), tmp_path / "claims.html", True)
    assert (tmp_path / "claims.json").read_text("utf-8") == content


def test_real_claims_on_a_tiny_scale(tiny, tmp_path, capsys):
    """One with trainings of three methods, one that maps a function."""
    claims = {name: CLAIMS[name] for name in ("infix", "gated")}
    run_claims(Lab(tiny), claims, tmp_path / "claims.html", True)
    record = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    assert list(record["claims"]) == list(claims) and record["scale"]["steps"] == tiny.steps
    assert len(record["claims"]["infix"]["numbers"]["trials"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("agrees: A prefix is a gated adapter (He et al. 2021)") for line in lines)
