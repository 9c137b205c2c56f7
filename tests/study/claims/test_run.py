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
    """Three claims of one job each. A job is appended to `calls` when it runs; the job `deadly` kills the run."""

    def claim_named(name):
        def work(item, scale):
            calls.append(item)
            if item == deadly:
                raise Killed
            return len(item)

        def claim(lab):
            (length,) = lab.run(work, [name])
            text = Text(name, f"{name} {length}")
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
    record = json.loads((tmp_path / "claims.json").read_text("utf-8"))
    assert list(record["claims"]) == ["first", "second", "third"] and record["results"]["work 'third'"] == 5
    assert capsys.readouterr().out.count("agrees: first 5 (Someone 2020): first 5") == 2


def test_what_is_run_is_kept_at_once(tiny, tmp_path):
    def two_jobs(lab):
        return lab.run(lambda item, scale: [1, 2][item], [0, 1, 2])  # the third fails

    with pytest.raises(IndexError):
        run_claims(Lab(tiny), {"two": two_jobs}, tmp_path / "claims.html", True)
    assert len(json.loads((tmp_path / "claims.json").read_text("utf-8"))["results"]) == 2


def test_what_was_measured_at_another_scale_is_not_lost(tiny, tmp_path):
    run_claims(Lab(tiny), staged_claims([]), tmp_path / "claims.html", True)
    before = (tmp_path / "claims.json").read_text("utf-8")
    lab = Lab(tiny.__class__(**vars(tiny) | {"seeds": (1, 2)}))
    with pytest.raises(UserError, match=r"claims.json: was measured with other settings; delete it, or name another"):
        run_claims(lab, staged_claims([]), tmp_path / "claims.html", True)
    assert (tmp_path / "claims.json").read_text("utf-8") == before


@pytest.mark.parametrize("content", ["", "[]", '{"claims": {}}', '{"results": {}}', '{"results": {}, "claims": {}}'])
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
    assert (
        len(record["results"]) == 4
        and "measure Trial(method='infix', task='short', rows=None, tokens=16)" in record["results"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("agrees: A prefix is a gated adapter (He et al. 2021)") for line in lines)
