"""The command from its flags to its files."""

import json
import re
import shutil

import numpy as np
import pytest
from models import peft_model, random_decoder
from rows import write_jsonl
from runs import run_quietly
from transformers import AutoModelForCausalLM

from prefix_tuning import bundled
from prefix_tuning.data.readers import load_rows
from prefix_tuning.demo.knowledge import load_relations
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.study import run
from prefix_tuning.study.__main__ import parse_study_config
from prefix_tuning.study.run import study


@pytest.fixture(autouse=True)
def _short_quiz(monkeypatch):
    monkeypatch.setattr(run, "load_relations", lambda: load_relations()[-1:])


def studied(folder, *flags):
    study(parse_study_config(["--output", str(folder / "study.html"), *map(str, flags)]))
    return json.loads((folder / "study.json").read_text("utf-8")), (folder / "study.html").read_text("utf-8")


def test_two_prefixes_become_a_page_and_its_numbers(tuned, tmp_path, capsys):
    flags = [f"--prefix={name}={folder}" for name, folder in tuned.items()]
    numbers, page = studied(tmp_path, *flags, "--rows", 12, "--question", "法国的首都是哪里？")
    assert list(numbers["prefixes"]) == ["short", "sentence"] and numbers["base"] == bundled.MODEL
    short = numbers["prefixes"]["short"]
    assert (short["dataset"], short["rows"], short["num_virtual_tokens"]) == ("bundled:short", 12, 16)
    assert short["question"]["question"] == "Human: 法国的首都是哪里？\n\nAssistant: "
    assert set(short) >= {"attention", "removal", "growth", "norms", "nearest_words"}
    (pair,) = numbers["pairs"]
    assert set(pair["after"][0]) == {"bundled:short", "bundled:sentence"} and pair["between"] is None  # 16 and 10 tokens
    assert set(numbers["quiz"]["right"]) == {"base", "short", "sentence"} and numbers["quiz"]["right"]["base"] == 1
    assert len(page.encode()) < 6e6
    assert [stage["step"] for stage in short["growth"]["stages"]] == [50, 100]
    assert page.count("<h2>") == 9
    # Eight pictures of each prefix, four of the training of `short`, two of both together, and the quiz.
    assert page.count('class="plotly-graph-div"') == 2 * 8 + 4 + 2 + 1
    for said in (
        "虚拟词的数目不同",
        "they have different lengths",
        "--save_steps 50",
        "12 of the 3218 rows of bundled:short)",
    ):
        assert said in page
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    said = f"{tmp_path / 'study.html'}: open it in a browser; the numbers are in {tmp_path / 'study.json'}\n"
    screen = capsys.readouterr()
    assert screen.out.endswith(said) and "--rows 3 takes a quarter of the time" in screen.out
    assert " left" in screen.err and "100 %" in screen.err  # as many rows passed as were estimated
    assert screen.err.rstrip().split("\r")[-1].startswith("sentence: quiz: 100 %")


def test_a_prefix_of_peft_is_studied_on_rows_that_are_named(tuned, tmp_path, rows_file):
    base = AutoModelForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL))
    base.name_or_path = base.config._name_or_path = bundled.MODEL
    peft_model(base, load_encoder(tuned["short"])[0]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="--prefix adapter: does not say where its rows are"):
        studied(tmp_path, "--prefix", tmp_path / "adapter")
    assert not (tmp_path / "study.html").exists()
    flags = ["--prefix", tmp_path / "adapter", "--dataset", rows_file, "--rows", 6, "--model_name_or_path", bundled.MODEL]
    numbers, page = studied(tmp_path, *flags)
    assert numbers["quiz"]["questions"] == 4 * 6 < numbers["quiz"]["there"]  # the quiz grows with the rows
    assert numbers["prefixes"]["adapter"]["rows"] == 6 and not numbers["pairs"] and page.count("<h2>") == 9


def test_another_family_becomes_a_page_that_says_what_it_has_not(quick_settings, tokenizer, tmp_path):
    """A Qwen3 with grouped heads, two prefixes, and their checkpoints."""
    options = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "use_sliding_window": False}
    base = tmp_path / "base"
    random_decoder("qwen3", **options).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("one", "two")):
        folder = {"output_dir": str(tmp_path / name), "seed": seed, "model_name_or_path": str(base)}
        run_quietly(quick_settings | folder | {"max_steps": 2, "save_steps": 1, "num_virtual_tokens": 3})
    flags = [*(f"--prefix={name}={tmp_path / name}" for name in ("one", "two")), "--model_name_or_path", base]
    numbers, page = studied(tmp_path, *flags, "--rows", 4, "--dataset", quick_settings["dataset"])
    one = numbers["prefixes"]["one"]
    share, first = np.array(one["attention"]["share"]), one["attention"]["by_distance"]
    assert one["attention"]["slopes"] is None and share.shape == (3, 6) and np.shape(first)[:2] == (3, 6)
    assert one["key_value_heads"] == 2 and np.array(one["norms"]["text"]).shape == (3, 2, 5)
    assert [stage["step"] for stage in one["growth"]["stages"]] == [1, 2]
    assert sum(part["kind"] == "head" for part in one["removal"]["parts"]) == 18
    assert len(numbers["pairs"][0]["between"]) == 11 and numbers["quiz"] is None
    assert "bundled bases only" in page and page.count("<h2>") == 9
    assert page.count("This model has no ALiBi") == page.count("这个模型没有 ALiBi") == 3
    # Seven pictures of each prefix, because ALiBi's penalty is not drawn; four of the training of each; five of both.
    assert page.count('class="plotly-graph-div"') == 2 * 7 + 2 * 4 + 5


def test_rows_without_labels_are_one_line(tuned, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", {"instruction": "长" * 2000, "input": "", "output": "短"})
    with pytest.raises(UserError, match="no row has a label left; every prompt fills 256 tokens"):
        studied(tmp_path, "--prefix", tuned["short"], "--dataset", rows)


@pytest.fixture
def prepared(tuned_model, tokenizer, tmp_path):
    """What `prepare` makes of rows, by the flags of the command."""

    def of(rows, *flags):
        path = write_jsonl(tmp_path / "rows.jsonl", *rows)
        config = parse_study_config([*flags, "--output", str(tmp_path / "x.html")])
        return run.prepare(str(path), load_rows(str(path), ("train",)), config, tuned_model, tokenizer)

    return of


def test_rows_are_evenly_spaced(prepared, tokenizer):
    rows = prepared([{"instruction": f"第{number}题", "output": "好"} for number in range(10)], "--rows", "4")
    questions = [tokenizer.decode(batch.input_ids) for batch in rows.batches]
    assert re.findall(r"第(\d)题", "".join(questions)) == ["0", "2", "5", "7"]
    assert (rows.name, rows.used, rows.cut, rows.there) == ("rows.jsonl", 4, 0, 10)
    assert tokenizer.decode(rows.prompt) == "Human: 第0题\n\nAssistant: "


def test_growth_is_measured_on_rows_of_all_lengths(prepared):
    rows = prepared([{"instruction": "好" * (1 + number % 100), "output": "好"} for number in range(200)])
    assert rows.used == 200 and sum(batch.rows for batch in rows.few) == 64
    lengths = [length for batch in rows.few for length in batch.lengths]
    assert max(lengths) > 100 and min(lengths) < 30


def test_the_question_fits_and_has_the_turns_before_it(prepared, tokenizer):
    long, short = {"instruction": "长" * 500, "output": "好"}, {"instruction": "短？", "output": "好" * 600}
    rows = prepared([long, short])
    assert (rows.used, rows.cut) == (1, 1) and tokenizer.decode(rows.prompt) == "Human: 短？\n\nAssistant: "
    turns = [("user", "法国的首都是哪里？"), ("assistant", "巴黎"), ("user", "那德国呢？"), ("assistant", "柏林")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    said = tokenizer.decode(prepared([talk]).prompt)
    assert said.startswith("Human: 法国的首都是哪里？\n\nAssistant: 巴黎</s>Human: 那德国呢？") and "柏林" not in said
    with pytest.raises(UserError, match=r"--question takes \d+ tokens; it must fit into 256"):
        prepared([short], "--question", "长" * 500)


def test_a_base_that_is_large_gets_few_rows(prepared, monkeypatch):
    monkeypatch.setattr(run, "LARGE", 1000)
    assert prepared([{"instruction": f"{number}", "output": "好"} for number in range(50)]).used == 20


def test_held_out_rows_are_preferred_to_training_rows(tmp_path):
    for settings, expected in (
        ({"dataset": "bundled:short", "eval_dataset": "bundled:short-eval"}, "bundled:short-eval"),
        ({"dataset": "bundled:short", "eval_dataset": "local:others.jsonl"}, "bundled:short"),
        ({"dataset": "bundled:short", "eval_dataset": None}, "bundled:short"),
    ):
        (tmp_path / "training_config.json").write_text(json.dumps(settings), "utf-8")
        assert run.trained_on("name", str(tmp_path)) == expected


def test_mistakes_are_found_before_the_base_is_loaded(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_model", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"typo.jsonl: no such file"):
        studied(tmp_path, "--prefix", tuned["short"], "--dataset", "typo.jsonl")


def test_json_has_six_digits_and_no_infinity():
    assert run.rounded({"a": [1.23456789, float("inf"), float("nan")], "b": 7, "c": True, "d": "x"}, None) == {
        "a": [1.23457, None, None],
        "b": 7,
        "c": True,
        "d": "x",
    }


def test_training_rows_that_only_this_machine_had_are_asked_for(tuned, tmp_path):
    folder = shutil.copytree(tuned["short"], tmp_path / "copy")
    settings = json.loads((folder / "training_config.json").read_text("utf-8")) | {"dataset": "local:rows.jsonl"}
    (folder / "training_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(UserError, match="--dataset ROWS"):
        studied(tmp_path, "--prefix", folder)
