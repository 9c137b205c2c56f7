import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.inference.settings import AskArguments, DecodingArguments, Prefixes
from prefix_tuning.parser import FLAGS_ELSEWHERE, Parser
from prefix_tuning.settings import Needs, SharedBaseArguments, flag
from prefix_tuning.training.settings import DataArguments, LoopArguments, ModelArguments, OutputArguments, PrefixArguments


@dataclass
class Garden:
    _argument_group_name = "garden"

    tree_count: int | None = flag(None, "How many trees.", at_least=1, needs=Needs(("fence",), "needs a fence"))
    width: float = flag(2.5, "In metres.")
    share: float | None = flag(None, "At most 100% of it.")
    shape: Literal["round", "square"] = flag("round", "Seen from above.")
    fence: bool = flag(True, "Around it.")
    pond: bool = flag(False, "In it.")


@dataclass
class House:
    _argument_group_name = "house"

    name: str = flag("home", "On the door.")


def parse(*argv, question=False):
    parser = Parser((Garden, House), most_used=("width", "name"), prog="build")
    if question:
        parser.add_argument("question", nargs="?")
    return parser.parse(list(argv))


def test_a_flag_has_the_type_and_the_default_of_its_field():
    defaults = {
        "tree_count": None,
        "width": 2.5,
        "share": None,
        "shape": "round",
        "fence": True,
        "pond": False,
        "name": "home",
    }
    assert parse() == (defaults, set())
    values, given = parse("--tree-count", "3", "--width=1", "--shape", "square", "--no_fence", "--pond")
    changed = {"tree_count": 3, "width": 1.0, "shape": "square", "fence": False, "pond": True}
    assert values == defaults | changed
    assert given == {"tree_count", "width", "shape", "fence", "pond"}
    assert parse("--fence", "false", "--pond", "true")[0] == defaults | {"fence": False, "pond": True}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--widht 3", "unknown argument --widht, did you mean --width?; see --help"),
        ("--zzz 3", "unknown argument --zzz; see --help"),
        ("--wid 3", "unknown argument --wid, did you mean --width?; see --help"),
        ("--width wide", "argument --width: invalid float value: 'wide'; see --help"),
        ("--width", "argument --width: expected one argument; see --help"),
        ("--name=", "--name is empty; give it a value or leave it out; see --help"),
    ],
)
def test_a_mistake_is_a_user_error(flags, message):
    with pytest.raises(UserError) as error:
        parse(*flags.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    "command, given, meant",
    [
        (parse_train_config, "--lr 1e-3", "learning_rate"),
        (parse_train_config, "--lr=1e-3", "learning_rate"),
        (parse_train_config, "--train_file a.jsonl", "dataset"),
        (parse_train_config, "--train-file a.jsonl", "dataset"),
        (parse_train_config, "--batch_size 8", "per_device_train_batch_size"),
        (parse_train_config, "--epochs 3", "num_train_epochs"),
        (parse_train_config, "--prefix ./chatbot", "prefix_from"),
        (parse_train_config, "--output ./chatbot", "output_dir"),
        (parse_infer_config, "--train_file a.jsonl", "input"),
        (parse_infer_config, "--output_dir ./chatbot", "prefix"),
        (parse_infer_config, "--max_tokens 8", "max_new_tokens"),
        (parse_infer_config, "--max_seq_length 8", "max_length"),
    ],
)
def test_flags_of_other_programs_are_answered_with_ours(command, given, meant):
    with pytest.raises(UserError, match=f"^unknown argument {given.split()[0]}, did you mean --{meant}[?]; see --help$"):
        command(given.split())


def test_a_flag_that_is_like_none_gets_no_hint():
    with pytest.raises(UserError, match=r"^unknown argument --lr; a question is one argument"):
        parse_infer_config(["--lr", "1e-3"])


def test_a_flag_of_another_program_means_one_of_ours():
    train = (ModelArguments, DataArguments, PrefixArguments, LoopArguments, OutputArguments)
    infer = (AskArguments, DecodingArguments, SharedBaseArguments, Prefixes)
    flags = [{field.name for group in groups for field in dataclasses.fields(group)} for groups in (train, infer)]
    assert FLAGS_ELSEWHERE.keys() <= set.union(*flags)
    for known in flags:
        theirs = [name for ours, names in FLAGS_ELSEWHERE.items() if ours in known for name in names.split()]
        assert len(theirs) == len(set(theirs)) and not known & {*theirs}


def test_help_has_the_groups_and_what_the_flags_are_for(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "most used: --width X In metres. (default: 2.5) --name NAME On the door. (default: home)" in text
    assert "garden: --tree_count N How many trees. --share X At most 100% of it. --shape {round,square} Seen" in text
    assert "--fence {true,false} Around it. (default: true) --pond In it." in text
    assert "--no_fence" not in text and "--tree-count" not in text
    assert text.count("--width") == text.count("--name") == 1 and "100% of it" in text


def test_a_switch_does_not_take_the_question_for_its_value():
    for argv in (("--pond", "why?"), ("why?", "--pond"), ("--pond", "true", "why?")):
        values, given = parse(*argv, question=True)
        assert (values["question"], values["pond"]) == ("why?", True) and "pond" in given
    assert parse("--pond", "false", "why?", question=True)[0]["pond"] is False


def test_a_question_that_begins_with_a_dash_goes_behind_two():
    for argv in (("--", "-5加3？", "--pond"), ("--pond", "--", "-5加3？")):
        values, _ = parse(*argv, question=True)
        assert (values["question"], values["pond"]) == ("-5加3？", True)
    with pytest.raises(UserError, match="goes after -- if it begins with -"):
        parse("-5加3？", question=True)


def test_an_argument_that_is_no_utf_8_is_named():
    with pytest.raises(UserError, match="--output_dir is not encoded in UTF-8"):
        parse_train_config(["--output_dir", "a\udcff"])
    with pytest.raises(UserError, match="the question is not encoded in UTF-8"):
        parse_infer_config(["a\udcff"])
