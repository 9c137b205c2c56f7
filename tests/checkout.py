"""Where the checkout is, and the real rows beside it."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REAL_ROWS = ROOT.parent / "shared" / "data" / "alpaca_zh"
needs_real_rows = pytest.mark.skipif(not REAL_ROWS.exists(), reason="the alpaca_zh rows are not on this machine")
