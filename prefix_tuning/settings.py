"""What the flags of the commands have in common. Imports no torch, so that --help and mistakes in flags are quick.

The settings of a command are dataclasses, of which parser.py makes flags. A field says all that holds for its setting:

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
MAX_SEED = 2**62  # torch takes 64-bit seeds; the rest is room for counting up from one
# Without --eval_dataset and --eval_fraction: the share of the rows that is held out, the most rows, and the fewest rows of
# which any are held out.
DEFAULT_HELD_OUT, MOST_HELD_OUT, FEWEST_TO_SPLIT = 0.05, 200, 40


# The flag --columns of every command. Its values: data/columns.py.
COLUMNS_HELP = (
    "The columns to read, where they are not recognised: instruction=NAME,output=NAME; also input=NAME, history=NAME and "
    "system=NAME; or messages=NAME for talks. What is left empty, as in context=, is not read."
)


class Needs(NamedTuple):
    """What a flag has no effect without: at least one of these `settings`. If none is on, `message` follows its name."""

    settings: tuple[str, ...]
    message: str


class Rules(NamedTuple):
    """What holds for a setting, beside its type."""

    at_least: float | None = None  # the bounds of a number, included; without a lower bound, nothing is checked
    at_most: float = sys.float_info.max  # so by default, infinity and NaN are refused
    needs: Needs | None = None  # for a value other than the default
    is_path: bool = False  # of a file or folder; many may also be names on the hub
    on_resume: str | None = None  # what a resumed training does with it: same, content or new, as explained below


def flag(default: Any, help: str, **rules: Any) -> Any:
    """The dataclass field of one setting, with its `Rules`."""
    return dataclasses.field(default=default, metadata={"help": help, "rules": Rules(**rules)})


# A resumed training refuses another value, which would change the remaining steps or the meaning of their figures.
same_flag = partial(flag, on_resume="same")
# It compares what is named, a base or rows: the name may change, what it names may not.
content_flag = partial(flag, on_resume="content")
# It takes the new command line's value: how long to train, what to report and save, ways to compute the same numbers.
new_flag = partial(flag, on_resume="new")


def names_on_resume(settings: type[Any], rule: str) -> tuple[str, ...]:
    """The names of the settings to which a resumed training applies this rule: same, content or new."""
    return tuple(field.name for field in dataclasses.fields(settings) if field.metadata["rules"].on_resume == rule)


def check_flags(settings: Any, **words: str) -> None:
    """Raises UserError for the first setting that is out of its bounds, is no usable path, or lacks what it needs.

    words: what replaces the {names} in the messages of `Needs`.
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
    """Raises UserError for a path of which the system cannot even say whether there is something: its name is too long, its
    links lead in a circle, or a folder on the way cannot be entered.
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
        None, "The base, if it is not at the name that the prefix records.", is_path=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = same_flag(
        "auto",
        "Compute type of the base. auto: bf16 on CUDA or a CPU that has units for it, else fp16 on CUDA, fp32 elsewhere. In "
        "training, encoder and optimizer are always fp32, and with fp16 the loss is scaled.",
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
        "that is larger than one device. The result stays the same. Reads safetensors only.",
    )
    shard_degree: int | None = new_flag(
        None,
        "With --shard_base: how many processes share one copy of the base. Default: all. On several machines, those of one "
        "if the base fits there: then gathering stays off the network.",
        needs=Needs(("shard_base",), "goes with --shard_base; add that flag"),
    )
