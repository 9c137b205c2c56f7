"""Every setting of the study. Imports no torch: see prefix_tuning/settings.py."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefix_tuning.data.columns import parse_columns
from prefix_tuning.errors import UserError
from prefix_tuning.inference.settings import Prefixes
from prefix_tuning.settings import COLUMNS_HELP, BaseArguments, check_flags, flag
from prefix_tuning.text import as_text


@dataclass
class StudyArguments:
    _argument_group_name = "study"

    dataset: str | None = flag(
        None,
        "Rows with answers on which every prefix is studied, named as for train.py. Default: for each prefix, the held-out "
        "rows that its training names, else its training rows.",
        is_path=True,
    )
    columns: str | None = flag(None, COLUMNS_HELP)
    output: str = flag(
        "study.html", "The page. Its numbers are written beside it, to a .json of the same name.", is_path=True
    )
    rows: int | None = flag(
        None,
        "How many rows of a dataset to use, evenly spaced, and 4 times as many quiz questions: half the rows take half the "
        "time. Default: 200; 20 if the base has more than 100 M weights.",
        at_least=1,
    )
    question: str | None = flag(None, "The question that is followed token by token. Default: the first row's.")


@dataclass
class StudyBaseArguments(BaseArguments):
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "fp32", "Compute type of the base. auto: bf16 where the hardware has units for it; its figures have 2 digits."
    )


@dataclass
class StudyConfig(StudyArguments, StudyBaseArguments, Prefixes):
    """All settings of a study. Raises UserError for values that make no sense, and if plotly is not installed."""

    def __post_init__(self) -> None:
        check_flags(self)
        check_page(self.output)
        self.question = self.question and as_text(self.question, "--question")
        self.columns = self.columns and as_text(self.columns, "--columns")
        parse_columns(self.columns)


def check_page(output: str) -> None:
    """Raises UserError unless the page and the .json of its numbers can be written, and plotly is there to draw it."""
    if importlib.util.find_spec("plotly") is None:
        raise UserError("the page needs plotly: pip install 'prefix-tuning[study]'")
    page = Path(output).absolute()
    if page.suffix != ".html":
        raise UserError(f"--output {output}: must end in .html; the numbers go beside it, to a .json")
    if not page.parent.is_dir():
        raise UserError(f"--output {output}: there is no such folder; make it, or name another")
    if page.is_dir() or page.with_suffix(".json").is_dir() or not os.access(page.parent, os.W_OK):
        raise UserError(f"--output {output}: the page and a .json beside it cannot be written; name another file")
