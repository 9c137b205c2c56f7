import pytest
from helpers import refuses

from prefix_tuning.cli import parse_infer_config

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
    "a\udcff": "no UTF-8 text",
    "--chat --max_length 100 --max_new_tokens 100": "must leave room for a question",
    "--score a.jsonl --num_beams 3": "--num_beams goes with a question or --chat or --input, not with --score",
    "hello --prefix a=x --prefix a=y": "there is a prefix a already",
    "hello --prefix base=x": "give it another name",
    "hello --prefix a=x --prefix=": "--prefix is empty",
    "hello --prefix nowhere/at/all": "nowhere/at/all: no such folder",
    "hello --prefix no/where": "no/where: no such folder, nor a repository of the hub that can be reached",
    "hello --btach_size 4": "did you mean --batch_size?",
    "-5加3等于几？": "goes behind -- if it begins with -",
}


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
