"""The parts that the flags of all commands share. It imports no torch, so that --help and mistakes in flags are quick.

The settings of a command are dataclasses, and parser.py makes flags of them. Each field says everything about its setting:

    seed: int = same_flag(42, "Decides the initial weights ...", at_least=0, at_most=MAX_SEED)
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Literal, NamedTuple

from prefix_tuning.errors import UserError

MAX_LENGTH = 256  # tokens per row in training, so also the longest text that a prefix has seen
MAX_SEED = 2**62  # torch takes 64-bit seeds, and epochs count up from the seed
# Without --eval_dataset and --eval_fraction, 5 % of the rows are held out, at most 200, and none of fewer than 40.
DEFAULT_HELD_OUT, MOST_HELD_OUT, FEWEST_TO_SPLIT = 0.05, 200, 40

# The help of --columns, which data/columns.py reads.
COLUMNS_HELP = (
    "The columns to read, where they are not recognised: instruction=NAME,output=NAME; also input=NAME, history=NAME and "
    "system=NAME; or messages=NAME for conversations. An empty name, as in context=, leaves a column out."
)


class Needs(NamedTuple):
    """A flag has no effect unless at least one of these `settings` is on. If none is, `message` follows the flag's name."""

    settings: tuple[str, ...]
    message: str


class Rules(NamedTuple):
    """The rules for a setting.

    at_least, at_most: inclusive bounds of a number. Without at_least, nothing is checked; with it, infinity and NaN are
    refused. needs: is checked if the value is not the default. is_path: it names a file or folder, or something on the hub.
    on_resume: same, content or new, as explained below.
    """

    at_least: float | None = None
    at_most: float = sys.float_info.max
    needs: Needs | None = None
    is_path: bool = False
    on_resume: str | None = None


def flag(default: Any, help: str, **rules: Any) -> Any:
    """The dataclass field of one setting, with its `Rules`."""
    return dataclasses.field(default=default, metadata={"help": help, "rules": Rules(**rules)})


# A resumed training refuses another value, because that would change the remaining steps, or the meaning of their figures.
same_flag = partial(flag, on_resume="same")
# The setting names a base or rows. A resumed training takes another name, but refuses another base or other rows.
content_flag = partial(flag, on_resume="content")
# A resumed training takes the new value: how long to train, what to report and save, other ways to the same numbers.
new_flag = partial(flag, on_resume="new")


def names_on_resume(settings: type[Any], rule: str) -> tuple[str, ...]:
    """The names of the settings with this rule for a resumed training: same, content or new."""
    return tuple(field.name for field in dataclasses.fields(settings) if field.metadata["rules"].on_resume == rule)


def check_flags(settings: Any, **words: str) -> None:
    """Raises UserError for the first setting that is out of its bounds, is no usable path, or lacks another that it needs.

    words: replace the {names} in the messages of `Needs`.
    """
    for field in dataclasses.fields(settings):
        value, rules = getattr(settings, field.name), field.metadata.get("rules", Rules())
        least, most, needs = rules.at_least, rules.at_most, rules.needs
        if value is not None and least is not None and not least <= value <= most:
            bounds = f"at least {Decimal(str(least)):f}"  # Decimal writes 0.00001 where str writes 1e-05
            bounds += f" and at most {most}" if most < sys.float_info.max else ""
            raise UserError(f"--{field.name} must be {bounds}, not {value}")
        if value is not None and rules.is_path:
            check_path(field.name, value)
        if needs and value != field.default and not any(getattr(settings, name) for name in needs.settings):
            raise UserError(f"--{field.name} {needs.message.format(**words)}")


def check_path(flag: str, path: str) -> None:
    """Raises UserError for a path that the system cannot look up: its name is too long, its links lead in a circle, or a
    folder on the way cannot be entered. A path at which there is nothing is no error here.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"--{flag} {path}: {error.strerror}; name another") from error


@dataclass
class BaseArguments:
    """The frozen base, for every command."""

    _argument_group_name = "base"

    model_name_or_path: str | None = content_flag(
        None, "The base, if it is no longer where the prefix's files say.", is_path=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = same_flag(
        "auto",
        "Compute type of the base. auto: bf16 on CUDA or a CPU that has units for it, else fp16 on CUDA, fp32 elsewhere. In "
        "training, encoder and optimizer are always fp32, and fp16 scales the loss.",
    )
    device: str = new_flag("auto", "auto (CUDA, else Apple's mps, else CPU), or a torch device such as cuda:1.")
    force: bool = new_flag(
        False, "Use a prefix even if the base has other weights or another tokenizer than the one that it was trained on."
    )


@dataclass
class SharedBaseArguments(BaseArguments):
    """A base that several processes may share."""

    shard_base: bool = new_flag(
        False,
        "Split the weights of the base over the processes that torchrun starts, and gather them layer by layer: for a base "
        "that is larger than one device. The results stay the same. Reads safetensors only.",
    )
    shard_degree: int | None = new_flag(
        None,
        "With --shard_base: the number of processes that share one copy of the base. Default: all. On several machines, "
        "give the number of processes per machine if the base fits on one: then gathering does not use the network.",
        needs=Needs(("shard_base",), "goes with --shard_base; add that flag"),
    )
