import pytest
from answers import refuses

from prefix_tuning.cli import parse_infer_config
from prefix_tuning.errors import UserError
from prefix_tuning.inference.answer_file import check_output
from prefix_tuning.inference.run import names_with_history
from prefix_tuning.inference.settings import InferConfig

BAD_FLAGS = {
    "": "ask one question, or use one of --chat, --input and --score",
    "hello --chat": "a question and --chat exclude each other",
    "--chat --score a.jsonl": "--chat and --score exclude each other",
    "--input a.jsonl": "--input needs an --output that ends in .jsonl",
    "--input a.jsonl --output b.json": "--input needs an --output that ends in .jsonl",
    "--score a.jsonl --output b.jsonl": "must end in .json",
    "hello --output b.jsonl": "--output goes with --input or --score, not with a question",
    "hello --columns input=a": "--columns goes with --input or --score, not with a question",
    "--score a.jsonl --columns frage": "--columns frage: must be like instruction=NAME,output=NAME",
    "--score a.jsonl --columns question=frage": "there is no 'question' to read; there are instruction,",
    "--score a.jsonl --resume": "--resume goes with --input, not with --score",
    "--input a.jsonl --output b.jsonl --compare": "--compare goes with a question or --chat, not with --input",
    "--input a.jsonl --output b.jsonl --max_length 9": "--max_length goes with a question or --chat",
    "hello --max_length 9 --max_new_tokens 9": "exclude each other",
    "hello --temperature 0.5": "--temperature is used with --do_sample only",
    "hello --temperature 0": "--temperature must be at least 0.00001",
    "hello --do_sample --temperature 0": "--temperature must be at least 0.00001",
    "hello --do_sample --top_p 0": "--top_p must be above 0",
    "hello --do_sample --top_k -1": "--top_k must be at least 0",
    "hello --repetition_penalty nan": "--repetition_penalty must be at least",
    "hello --num_beams 0": "--num_beams must be at least 1",
    "hello --num_return_sequences 2": "--num_return_sequences 2 needs --do_sample, or as many --num_beams",
    "hello --do_sample --num_beams 2 --num_return_sequences 3": "cannot be above --num_beams",
    "hello --seed -1": "--seed must be at least 0",
    "hello --seed 18446744073709551616": "--seed must be at least 0 and at most",
    "hello --do_sample --temperature 1e-40": "--temperature must be at least 0.00001",
    "--chat --shard_base": "--shard_base goes with a question or --input or --score, not with --chat",
    "a\udcff": "not encoded in UTF-8",
    "--chat --max_length 100 --max_new_tokens 100": "must leave room for a question",
    "--score a.jsonl --num_beams 3": "--num_beams goes with a question or --chat or --input, not with --score",
    "hello --prefix a=x --prefix a=y": "there is a prefix a already",
    "hello --prefix base=x": "give it another name",
    "hello --prefix a=x --prefix=": "--prefix is empty",
    "hello --prefix nowhere/at/all": "nowhere/at/all: no such folder",
    "hello --prefix no/where": "no/where: no such folder, nor a repository of the hub that can be reached",
    "hello --btach_size 4": "did you mean --batch_size?",
    "-5加3等于几？": "goes after -- if it begins with -",
}

ASKING = {
    "question": "hello",
    "chat": "--chat",
    "input": "--input a.jsonl --output b.jsonl",
    "score": "--score a.jsonl",
}
# The tasks that each flag goes with.
TASKS = {
    "--columns input=a": "input score",
    "--resume": "input",
    "--batch_size 2": "input",
    "--compare": "question chat",
    "--history": "chat",
    "--max_new_tokens 5": "question chat input",
    "--max_length 99": "question chat",
    "--do_sample": "question chat input",
    "--repetition_penalty 2": "question chat input",
    "--num_beams 2": "question chat input",
    "--num_beams 2 --num_return_sequences 2": "question input",
    "--cache static": "question chat input",
    "--seed 1": "question chat input score",
    "--shard_base": "question input score",
}
# The flags with bounds: with the value at the bound, and with one beyond it.
BOUNDS = {
    "--max_new_tokens": ("1", "0"),
    "--max_length": ("1", "0"),
    "--do_sample --temperature": ("1e-5", "9e-6"),
    "--do_sample --top_p": ("1", "1.01"),
    "--do_sample --top_k": ("0", "-1"),
    "--seed": ("0", "-1"),
    "--repetition_penalty": ("1e-5", "9e-6"),
    "--num_beams": ("1", "0"),
    "--num_beams 3 --num_return_sequences": ("3", "4"),
    "--do_sample --num_return_sequences": ("1", "0"),
    "--chat --max_length 100 --max_new_tokens": ("99", "100"),
    "--chat --max_new_tokens": ("255", "256"),
    "--input a.jsonl --output b.jsonl --batch_size": ("1", "0"),
}


def test_flags_that_are_not_given_have_their_defaults():
    defaults = {"chat": False, "input": None, "score": None, "columns": None, "output": None, "resume": False}
    defaults |= {"batch_size": 64, "compare": False, "max_new_tokens": None, "max_length": None, "do_sample": False}
    defaults |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "seed": 42, "repetition_penalty": 1.0, "num_beams": 1}
    defaults |= {"num_return_sequences": 1, "cache": "dynamic", "prefix": ["./chatbot"], "force": False}
    assert vars(parse_infer_config(["hello"])).items() >= defaults.items()


@pytest.mark.parametrize("flags, bounds", BOUNDS.items())
def test_a_value_at_a_bound_is_taken_and_one_beyond_it_refused(flags, bounds):
    flags = flags.split() if "--chat" in flags or "--input" in flags else ["hello", *flags.split()]
    parse_infer_config([*flags, bounds[0]])
    with pytest.raises(UserError, match=f"{flags[-1]} .*must|{flags[-1]} .*needs"):
        parse_infer_config([*flags, bounds[1]])


@pytest.mark.parametrize("flags, tasks", TASKS.items())
def test_a_flag_goes_with_its_tasks_alone(flags, tasks):
    for task, asking in ASKING.items():
        if task in tasks.split():
            parse_infer_config([*asking.split(), *flags.split()])
        else:
            with pytest.raises(UserError, match=f"goes with .*, not with .*{task}"):
                parse_infer_config([*asking.split(), *flags.split()])


def test_a_prefix_may_have_a_longer_name_than_a_file():
    config = parse_infer_config(["？", "--prefix", "长" * 300 + "=folder"])
    assert config.named_prefixes() == {"长" * 300: "folder"}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message):
    refuses(message, *flags.split())


def test_prefixes_are_named_or_take_the_name_of_their_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    config = parse_infer_config(["hello", "--prefix", "one=x/y", "--prefix", "x/two", "--prefix", str(tmp_path / "a=b")])
    assert config.named_prefixes() == {"one": "x/y", "two": "x/two", "a=b": str(tmp_path / "a=b")}
    assert list(parse_infer_config(["hello"]).named_prefixes()) == ["chatbot"]


@pytest.mark.parametrize("flags", ["-- -5加3？ --prefix x --compare", "--compare --prefix x -- -5加3？"])
def test_a_question_that_begins_with_a_dash_goes_behind_two(flags):
    config = parse_infer_config(flags.split())
    assert (config.question, config.prefix, config.compare) == ("-5加3？", ["x"], True)


@pytest.mark.parametrize("flags", ["hello --prefix {}", "hello --prefix a={}", "--input {} --output a.jsonl", "--score {}"])
def test_a_path_whose_links_lead_in_a_circle_is_refused(flags, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refuses("circle: Too many levels of symbolic links; name another", *flags.format(tmp_path / "circle").split())


def test_flags_in_utf8_are_read_as_such_where_python_takes_them_for_ascii():
    columns, question = (text.encode().decode("ascii", "surrogateescape") for text in ("instruction=问题", "你好"))
    assert InferConfig(score="a.jsonl", columns=columns).columns == "instruction=问题"
    assert InferConfig(question=question).question == "你好"


def test_a_conversation_with_a_prefix_of_single_turns_is_kept_on_request_only(tuned):
    prefix = [f"short={tuned['short']}"]  # trained on single turns
    assert InferConfig(chat=True, prefix=prefix).history is False
    assert names_with_history(InferConfig(chat=True, prefix=prefix)) == set()
    assert names_with_history(InferConfig(chat=True, prefix=prefix, history=True)) == {"short", "base"}


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--output .* is no file; name another"):
        check_output(str(tmp_path), None, resume=True)


@pytest.mark.parametrize("flags", ["hello --model_name_or_path", "--input", "--score", "--input a.jsonl --output"])
def test_a_path_of_links_in_a_circle_is_one_line(tmp_path, flags):
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    words = [*flags.split(), str(tmp_path / "circle.jsonl")]
    if words[0] == "--input" and "--output" not in words:
        words += ["--output", "b.jsonl"]
    with pytest.raises(UserError, match=r"circle\.jsonl: Too many levels of symbolic links"):
        parse_infer_config(words)
