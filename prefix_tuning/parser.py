"""From dataclasses to flags, by transformers' HfArgumentParser. Importing it takes about a second, so the commands
import it when they start, and not before."""

import argparse
import dataclasses
import difflib
import itertools
from typing import Any, NoReturn

from transformers import HfArgumentParser

from prefix_tuning.errors import UserError
from prefix_tuning.text import as_text

# Our flags, each with the names of the same flag in similar programs. A name may stand for several of ours; the first that
# the command has is suggested: for --train_file, that is --dataset in train.py and --input in infer.py.
FLAGS_ELSEWHERE = {
    "learning_rate": "lr",
    "dataset": "train_file train_data train_path data data_file data_path dataset_name dataset_path input input_file",
    "eval_dataset": "validation_file valid_file eval_file test_file dev_file eval_data val_data test_data",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
    "num_train_epochs": "epochs epoch num_epochs n_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps total_steps",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "max_grad_norm": "grad_clip gradient_clipping max_norm",
    "gradient_accumulation_steps": "accumulation_steps grad_accum grad_accum_steps gradient_accumulation",
    "num_virtual_tokens": "pre_seq_len prefix_length prefix_len prefix_tokens num_prefix_tokens",
    "max_length": "max_seq_length max_seq_len seq_length cutoff_len model_max_length block_size max_source_length",
    "output_dir": "output out out_dir save_dir save_path",
    "precision": "bf16 fp16 fp32 dtype torch_dtype mixed_precision",
    "prefix_from": "prefix adapter adapter_path adapter_name_or_path peft_model checkpoint",
    "prefix": "output_dir adapter adapter_path adapter_name_or_path peft_model checkpoint ptuning_checkpoint",
    "resume_from_checkpoint": "resume",
    "model_name_or_path": "model model_name model_path model_id base base_model base_model_name_or_path",
    "input": "dataset train_file test_file data data_file data_path input_file file questions",
    "output": "output_file out out_file",
    "max_new_tokens": "max_tokens max_output_tokens",
    "temperature": "temp",
    "num_beams": "beams beam_size",
}


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each flag (--no-x and --x-y work too), and its default unless that is "off"."""

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
        return text.replace("%", "%%")  # because argparse formats it with %


class Parser(HfArgumentParser):
    """A parser whose errors are UserErrors.

    groups: dataclasses of `settings.flag`, one per group of flags in --help. most_used: names of flags that --help shows
    before these groups, in this order.
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

    def add_prefix_flag(self, remark: str = "") -> None:
        """Adds --prefix, whose default is in inference/settings.py. remark: what else its help says."""
        self.add_argument(
            "--prefix",
            action="append",
            default=argparse.SUPPRESS,
            metavar="[NAME=]DIR",
            help="A prefix: an output folder of train.py, a PEFT adapter's folder, or either's name on the hub. May be "
            f"repeated{remark} (default: ./chatbot).",
        )

    def format_help(self) -> str:
        """The help, with the most used flags in a group at the top."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        flags = {action.dest: action for action in self._actions if action.help != argparse.SUPPRESS}
        groups = [("most used", [flags.pop(name) for name in self.most_used])]
        in_groups = [*self._action_groups[2:], *self._action_groups[:2]]  # argparse's own, with --help and --debug, last
        groups += [(group.title or "", [x for x in group._group_actions if x.dest in flags]) for group in in_groups]
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str]) -> tuple[dict[str, Any], set[str]]:
        """Returns the values of all flags by name, and the names of the flags that are on the command line."""
        question: list[str] = []
        if "--" in argv:  # the next argument is the question, even if it begins with -; flags may follow it
            dashes = argv.index("--")
            question, argv = argv[dashes : dashes + 2], argv[:dashes] + argv[dashes + 2 :]
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
        known = {name.lstrip("-"): name for action in self._actions for name in reversed(action.option_strings)}
        given = argument.split("=")[0].lstrip("-")
        other = given.replace("-", "_").lower()
        names = [ours for ours, theirs in FLAGS_ELSEWHERE.items() if ours in known and other in theirs.split()]
        close = [known[name] for name in names or difflib.get_close_matches(given, known, n=1)]
        hint = f", did you mean {close[0]}?" if close else ""
        if not hint and any(action.dest == "question" for action in self._actions):
            hint = "; a question is one argument, in quotes, and goes after -- if it begins with -"
        self.error(f"unknown argument {argument}{hint}")


def _with_help_only(group: Any) -> Any:
    """The dataclass with `help` as its only metadata, because HfArgumentParser gives all metadata to `add_argument`."""
    fields = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata={"help": field.metadata["help"]}))
        for field in dataclasses.fields(group)
    ]
    return dataclasses.make_dataclass(group.__name__, fields, namespace={"_argument_group_name": group._argument_group_name})
