"""The papers' claims, each tried in a small experiment: `python -m prefix_tuning.study.claims [--quick]`. See run.py."""

from collections.abc import Callable
from functools import partial

from prefix_tuning.command import run_command
from prefix_tuning.study.claims.settings import ClaimsConfig


def parse_claims_config(argv: list[str]) -> ClaimsConfig:
    """The settings that the command line gives. Raises UserError for those that make no sense."""
    from prefix_tuning.parser import Parser

    description = "Try each claim of the papers in a small experiment on the bundled base, and write a page of the verdicts."
    values, _ = Parser((ClaimsConfig,), (), prog="python -m prefix_tuning.study.claims", description=description).parse(argv)
    return ClaimsConfig(**values)


def _claims(argv: list[str]) -> Callable[[], object]:
    config = parse_claims_config(argv)
    from prefix_tuning.study.claims.run import try_claims

    return partial(try_claims, config)


if __name__ == "__main__":
    run_command(_claims)
