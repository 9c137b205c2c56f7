"""Dataclasses to flags, by transformers' HfArgumentParser."""

import argparse
import difflib
import itertools

from transformers import HfArgumentParser

from prefix_tuning.errors import UserError


class Parser(HfArgumentParser):
    """Dataclasses to flags, with mistakes as UserError."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.add_argument("--debug", action="store_true", help="Show where in the program an error was raised.")
        for action in self._actions:
            if action.const is False:  # the --no_X that HfArgumentParser adds to a switch X that is on by default
                action.help, action.default = f"The same as --{action.dest} false.", argparse.SUPPRESS

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str]) -> tuple[dict, set[str]]:
        """Returns the value of every flag by name, and the names of those that the command line gives."""
        question: list[str] = []
        if "--" in argv:  # what follows is the question, even if it begins with -; flags may come behind it
            place = argv.index("--")
            question, argv = argv[place : place + 2], argv[:place] + argv[place + 2 :]
        # A bare `--compare` before a question must not take the question for its value.
        switches = {
            name for action in self._actions if action.nargs == "?" and action.const for name in action.option_strings
        }
        argv = [
            f"{part}=true" if part in switches and after.lower() not in ("true", "false") else part
            for part, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
        ]
        *parts, unknown = self.parse_args_into_dataclasses(
            argv + question, return_remaining_strings=True, look_for_args_file=False
        )
        values = {name: value for part in parts for name, value in vars(part).items() if name != "debug"}
        if unknown:
            known = {name for action in self._actions for name in action.option_strings}
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            if not hint and any(action.dest == "question" for action in self._actions):
                hint = "; a question is one argument, in quotes, and goes behind -- if it begins with -"
            self.error(f"unknown argument {unknown[0]}{hint}")
        for name, value in values.items():
            if "" in (value if isinstance(value, list) else [value]) and name != "question":
                self.error(f"--{name} is empty; give it a value or leave it out")
        names = {part.split("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
        return values, {name for name in values if name in names or f"no_{name}" in names}
