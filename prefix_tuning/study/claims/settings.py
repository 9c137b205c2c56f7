"""The settings of the claims' command, and how large its experiments are. Imports no torch."""

from dataclasses import dataclass

from prefix_tuning.settings import check_flags, flag
from prefix_tuning.study.settings import check_page


@dataclass
class ClaimsConfig:
    """The settings of the command line. Raises UserError for values that make no sense, and if plotly is not installed."""

    _argument_group_name = "claims"

    quick: bool = flag(
        False, "One seed, fewer steps, rows and points: under 6 minutes on 2 cores, to see what it does, with rough figures."
    )
    output: str = flag(
        "claims.html",
        "The page. A .json of the same name is written beside it after each training, with every number. A second start "
        "with the same settings reuses the trainings that it finds there; delete the .json to measure all again.",
        is_path=True,
    )

    def __post_init__(self) -> None:
        check_flags(self)
        check_page(self.output)


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    steps: optimizer steps of a training, of `rows_per_step` rows each; the rate falls linearly to zero
    seeds: for the starting weights, the order of the rows, and which rows are drawn where few are
    lengths: of prefixes, in tokens
    sizes: of small training sets, in rows
    length_rows: training rows of the claim on lengths
    kept: tokens of the prefixes that a text becomes
    scored: held-out rows that are scored, at most; half as many validation rows choose a rate
    """

    steps: int
    rows_per_step: int
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    length_rows: int
    kept: tuple[int, ...]
    scored: int

    @property
    def few(self) -> tuple[int, ...]:
        """The first and the third of the sizes."""
        return self.sizes[:3:2]


FULL = Scale(300, 16, (1, 2, 3), (1, 2, 4, 8, 16, 32, 64), (20, 50, 100, 500), 800, (4, 8, 16, 32, 64), 400)
QUICK = Scale(60, 16, (1,), (1, 8, 64), (20, 100), 200, (4, 16, 64), 200)
