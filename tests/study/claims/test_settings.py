import subprocess
import sys

import pytest

from prefix_tuning.cli import claims_command
from prefix_tuning.study.claims.settings import FULL, QUICK


def test_quick_is_less_of_the_same():
    assert QUICK.steps < FULL.steps and len(QUICK.seeds) == 1 and len(FULL.seeds) == 3
    assert set(QUICK.lengths) < set(FULL.lengths) and set(QUICK.sizes) < set(FULL.sizes) == {20, 50, 100, 500}
    assert FULL.lengths == (1, 2, 4, 8, 16, 32, 64)


def test_settings_load_no_torch():
    code = "import sys, prefix_tuning.study.claims.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "flags, missing, message",
    [
        (["--fast"], False, "unknown argument --fast"),
        ([], True, "error: the page needs plotly: pip install 'prefix-tuning[study]'\n"),
    ],
)
def test_mistakes_are_one_line_before_any_work(flags, missing, message, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["claims", *flags])
    if missing:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    streams = sys.stdin, sys.stdout, sys.stderr
    for name in ("stdin", "stdout", "stderr"):  # the command sets them up anew
        monkeypatch.setattr(
            sys, name, open(getattr(sys, f"__{name}__").fileno(), "r" if name == "stdin" else "w", closefd=False)
        )
    with pytest.raises(SystemExit) as stop:
        claims_command()
    sys.stdin, sys.stdout, sys.stderr = streams
    error = capfd.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
