"""What a prefix does, as one page of pictures: `python -m prefix_tuning.study [--prefix NAME=DIR ...]`. See run.py."""

from collections.abc import Callable
from functools import partial

from prefix_tuning.command import run_command
from prefix_tuning.study.settings import StudyArguments, StudyBaseArguments, StudyConfig


def parse_study_config(argv: list[str]) -> StudyConfig:
    """The settings that the command line gives. Raises UserError for those that make no sense."""
    from prefix_tuning.parser import Parser

    parser = Parser(
        (StudyArguments, StudyBaseArguments),
        ("prefix", "dataset", "output", "rows", "question"),
        prog="python -m prefix_tuning.study",
        description="What a prefix does: its attention, what breaks without parts of it, and more, as one page of pictures.",
    )
    parser.add_prefix_flag()
    values, _ = parser.parse(argv)
    return StudyConfig(**values)


def _study(argv: list[str]) -> Callable[[], object]:
    config = parse_study_config(argv)
    from prefix_tuning.study.run import study

    return partial(study, config)


if __name__ == "__main__":
    run_command(_study)
