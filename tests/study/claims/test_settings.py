import subprocess
import sys

import pytest

from prefix_tuning.errors import UserError
from prefix_tuning.study.claims.__main__ import parse_claims_config
from prefix_tuning.study.claims.settings import FULL, QUICK, ClaimsConfig


def test_quick_is_less_of_the_same():
    assert QUICK.steps < FULL.steps and len(QUICK.seeds) == 1 and len(FULL.seeds) == 3
    assert set(QUICK.lengths) < set(FULL.lengths) and set(QUICK.sizes) < set(FULL.sizes) == {20, 50, 100, 500}
    assert FULL.lengths == (1, 2, 4, 8, 16, 32, 64)


def test_settings_load_no_torch():
    code = "import sys, prefix_tuning.study.claims.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mistakes_and_a_missing_plotly_are_told_before_any_work(tmp_path, monkeypatch):
    assert parse_claims_config(["--quick"]) == ClaimsConfig(quick=True, output="claims.html")
    for output, message in (("claims.json", "must end in .html"), ("gone/claims.html", "there is no such folder")):
        with pytest.raises(UserError, match=message):
            parse_claims_config(["--output", output])
    for folder, output in (("page.html", "page.html"), ("numbers.json", "numbers.html")):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match=rf"{output}: the page and a \.json beside it cannot be written"):
            parse_claims_config(["--output", str(tmp_path / output)])
    with pytest.raises(UserError, match="unknown argument --fast"):
        parse_claims_config(["--fast"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prefix-tuning\[study\]'"):
        parse_claims_config([])


def test_help_says_what_a_second_start_does(capsys):
    with pytest.raises(SystemExit):
        parse_claims_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "reuses the trainings that it finds there" in text and "--quick" in text and "most used" not in text
