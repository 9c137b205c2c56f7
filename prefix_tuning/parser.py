"""From dataclasses to flags, by transformers' HfArgumentParser. Importing it takes about a second, so only cli.py does."""

import argparse
import dataclasses
import difflib
import itertools
from typing import Any, NoReturn

from transformers import HfArgumentParser

from prefix_tuning.errors import UserError
from prefix_tuning.text import as_text


class HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag (--no-x and --x-y work, too), and its default where that says more than "off"."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        if action.nargs == "?":  # a switch
            value = "{true,false}" if action.default else ""
        return f"{action.option_strings[0]} {value}".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, action.dest.split("_")[-1].upper())  # type: ignore[call-overload]

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if not any(default is nothing for nothing in (None, False, argparse.SUPPRESS)):
            text += f" (default: {'true' if default is True else default})"
        return text.replace("%", "%%")  # argparse formats it


class Parser(HfArgumentParser):
    """A parser whose errors are UserErrors. groups: dataclasses of `settings.flag`, one per group of flags in --help.
    most_used: names of flags that --help shows before these groups, in this order.
    """

    def __init__(self, groups: tuple[type[Any], ...], most_used: tuple[str, ...], **options: Any):
        usage = "%(prog)s [--flag value ...]"
        super().__init__(
            map(_with_help_only, groups), formatter_class=HelpFormatter, usage=usage, allow_abbrev=False, **options
        )
        self.add_argument("--debug", action="store_true", help="Show where in the program an error was raised.")
        for action in self._actions:
            if action.const is False:  # the --no_X that HfArgumentParser adds to a switch X that is on by default
                action.help = action.default = argparse.SUPPRESS
        self.most_used = most_used

    def format_help(self) -> str:
        """The help, the most used flags in a group of their own at the top."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        flags = {action.dest: action for action in self._actions if action.help != argparse.SUPPRESS}
        groups = [("most used", [flags.pop(name) for name in self.most_used])]
        in_groups = [*self._action_groups[2:], *self._action_groups[:2]]  # argparse's own two, for --help and --debug, last
        groups += [(group.title or "", [x for x in group._group_actions if x.dest in flags]) for group in in_groups]
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

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
            parts = value if isinstance(value, list) else [value]
            if "" in parts and name != "question":
                self.error(f"--{name} is empty; give it a value or leave it out")
            for part in parts:
                if isinstance(part, str):
                    as_text(part, "the question" if name == "question" else f"--{name}")
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
