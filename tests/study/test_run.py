"""The command from its flags to its files."""

import json
import re
import shutil

import pytest
from helpers import peft_model, run_quietly, write_jsonl
from transformers import AutoModelForCausalLM

from prefix_tuning import bundled
from prefix_tuning.cli import parse_study_config
from prefix_tuning.demo.build import load_relations
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.study import run
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
    assert short["question"]["question"] == "法国的首都是哪里？"
    assert set(short) >= {"attention", "removal", "growth", "norms", "nearest_words"}
    (pair,) = numbers["pairs"]
    assert set(pair["after"][0]) == {"bundled:short", "bundled:sentence"} and pair["between"] is None  # 16 and 10 tokens
    assert set(numbers["quiz"]["right"]) == {"base", "short", "sentence"} and numbers["quiz"]["right"]["base"] == 1
    assert len(page.encode()) < 6e6
    assert [stage["step"] for stage in short["growth"]["stages"]] == [50, 100]
    assert page.count("<h2>") == 9
    assert page.count('class="plotly-graph-div"') == 2 * 6 + 3  # six for each; growth of short, the two together, the quiz
    for said in ("虚拟词的数目不同", "they differ in length", "--save_steps 50", "12 of the 3218 rows of bundled:short"):
        assert said in page
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    said = f"{tmp_path / 'study.html'}: open it in a browser; the numbers are in {tmp_path / 'study.json'}\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_prefix_of_peft_is_studied_on_rows_that_are_named(tuned, tmp_path, rows_file):
    base = AutoModelForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL))
    base.name_or_path = base.config._name_or_path = bundled.MODEL
    peft_model(base, load_encoder(tuned["short"])[0]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="--prefix adapter: does not say where its rows are"):
        studied(tmp_path, "--prefix", tmp_path / "adapter")
    assert not (tmp_path / "study.html").exists()
    flags = ["--prefix", tmp_path / "adapter", "--dataset", rows_file, "--rows", 6, "--model_name_or_path", bundled.MODEL]
    numbers, page = studied(tmp_path, *flags)
    assert numbers["prefixes"]["adapter"]["rows"] == 6 and not numbers["pairs"] and page.count("<h2>") == 8


def test_another_base_has_no_quiz(random_base, tuned, tmp_path, settings):
    run_quietly(settings | {"max_steps": 1})
    flags = ["--prefix", tmp_path / "out", "--model_name_or_path", random_base, "--rows", 4]
    numbers, page = studied(tmp_path, *flags, "--dataset", settings["dataset"])
    assert numbers["quiz"] is None and "bundled mini Bloom only" in page
    assert [stage["step"] for stage in numbers["prefixes"]["out"]["growth"]["stages"]] == [1]


def test_rows_without_labels_are_one_line(tuned, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", {"instruction": "长" * 2000, "input": "", "output": "短"})
    with pytest.raises(UserError, match="no row has a label left; every prompt fills 256 tokens"):
        studied(tmp_path, "--prefix", tuned["short"], "--dataset", rows)


def test_rows_are_evenly_spaced(tuned, tmp_path, tuned_model, tokenizer):
    rows = [{"instruction": f"第{number}题", "input": "", "output": "好"} for number in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", *rows)
    config = parse_study_config(["--rows", "4", "--output", str(tmp_path / "x.html")])
    found = run.read_rows(str(path), config, tuned_model, tokenizer)
    questions = [tokenizer.decode(batch.input_ids) for batch in found.batches]
    assert re.findall(r"第(\d)题", "".join(questions)) == ["0", "2", "5", "7"]
    assert (found.used, found.there, found.question) == (4, 10, "第0题")


def test_training_rows_that_only_this_machine_had_are_asked_for(tuned, tmp_path):
    folder = shutil.copytree(tuned["short"], tmp_path / "copy")
    settings = json.loads((folder / "training_config.json").read_text("utf-8")) | {"dataset": "local:rows.jsonl"}
    (folder / "training_config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(UserError, match="--dataset ROWS"):
        studied(tmp_path, "--prefix", folder)
