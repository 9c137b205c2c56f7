"""From dataclasses to flags, by transformers' HfArgumentParser. Importing it takes about a second, so only cli.py does."""

import argparse
import dataclasses
import difflib
import itertools
from typing import Any, NoReturn

from transformers import HfArgumentParser

from prefix_tuning.errors import UserError


class Parser(HfArgumentParser):
    """A parser whose errors are UserErrors. groups: dataclasses of `settings.flag`, one per group of flags in --help."""

    def __init__(self, groups: tuple[type[Any], ...], **options: Any):
        super().__init__(map(_with_help_only, groups), allow_abbrev=False, **options)
        self.add_argument("--debug", action="store_true", help="Show where in the program an error was raised.")
        for action in self._actions:
            if action.const is False:  # the --no_X that HfArgumentParser adds to a switch X that is on by default
                action.help, action.default = f"The same as --{action.dest} false.", argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str]) -> tuple[dict[str, Any], set[str]]:
        """Returns the value of every flag by name, and the names of those that the command line gives."""
        question: list[str] = []
        if "--" in argv:  # what follows is the question, even if it begins with -; flags may come behind it
            place = argv.index("--")
            question, argv = argv[place : place + 2], argv[:place] + argv[place + 2 :]
        # A bare `--compare` before a question must not take the question for its value.
        switches = {name for action in self._actions if action.nargs == "?" for name in action.option_strings}
        argv = [
            f"{part}=true" if part in switches and after.lower() not in ("true", "false") else part
            for part, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
        ]
        found, unknown = self.parse_known_args(argv + question)
        values = {name: value for name, value in vars(found).items() if name != "debug"}
        if unknown:
            self._refuse_unknown(unknown[0])
        for name, value in values.items():
            if "" in (value if isinstance(value, list) else [value]) and name != "question":
                self.error(f"--{name} is empty; give it a value or leave it out")
        names = {part.split("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
        return values, {name for name in values if name in names or f"no_{name}" in names}

    def _refuse_unknown(self, argument: str) -> NoReturn:
        known = {name for action in self._actions for name in action.option_strings}
        close = difflib.get_close_matches(argument.split("=")[0], known, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        if not hint and any(action.dest == "question" for action in self._actions):
            hint = "; a question is one argument, in quotes, and goes behind -- if it begins with -"
        self.error(f"unknown argument {argument}{hint}")


def _with_help_only(group: Any) -> Any:
    """The dataclass with `help` as its only metadata: HfArgumentParser passes all of it on to argparse's `add_argument`."""
    fields = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata={"help": field.metadata["help"]}))
        for field in dataclasses.fields(group)
    ]
    return dataclasses.make_dataclass(group.__name__, fields, namespace={"_argument_group_name": group._argument_group_name})
