"""Which tokens end an answer, and which one pads, on a base whose files do not agree about it."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from answers import FRANCE, GREEDY, complete, run_infer
from rows import questions, write_rows
from runs import metrics_of
from transformers import AutoTokenizer, BloomForCausalLM, GenerationConfig

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.identity import recorded_end
from prefix_tuning.base_model.loading import align_special_tokens, ends_of, load_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.training.run import train

CPU = torch.device("cpu")
EOS, OTHER_END = 2, 7


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory):
    """The bundled base, but its generation_config waits for another end, and its tokenizer has no token that pads."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    shutil.copytree(bundled.resolve(bundled.MODEL), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": OTHER_END}), "utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, None)
    return folder


def test_infer_answers_as_on_a_base_whose_files_agree(odd_base, prefixes, tmp_path, capsys):
    on_odd = [*prefixes, "--model_name_or_path", odd_base]
    run_infer(FRANCE, *on_odd)
    out, err = capsys.readouterr()
    assert out == "巴黎\n"
    assert f"{odd_base}: its tokenizer ends a text with token 2, the base's generation_config with 7: each ends" in err
    run_infer(FRANCE, *on_odd, "--compare")
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1] == ["short", "巴黎"]
    rows = write_rows(tmp_path / "in.jsonl", questions(12))
    answers = []
    for name, flags in (("odd", on_odd), ("alone", [*on_odd, "--batch_size", "1"]), ("right", prefixes)):
        run_infer("--input", rows, "--output", tmp_path / f"{name}.jsonl", *flags)
        answers.append((tmp_path / f"{name}.jsonl").read_text("utf-8"))
    assert answers[0] == answers[1] == answers[2]
    scores = []
    for flags in (on_odd, prefixes):
        run_infer("--score", write_rows(tmp_path / "s.jsonl", [{"instruction": FRANCE, "output": "巴黎"}]), *flags)
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1]


def test_training_answers_as_on_a_base_whose_files_agree(odd_base, tuned, tmp_path, capsys):
    rows = write_rows(tmp_path / "eval.jsonl", [row for row in questions(24) if row.pop("prefix") in (None, "short")])
    found = []
    for name in (bundled.MODEL, str(odd_base)):
        output = tmp_path / Path(name).name
        flags = f"--model_name_or_path {name} --prefix_from {tuned['short']} --learning_rate 0 --max_steps 1"
        flags += f" --eval_dataset {rows} --eval_exact_match true --dataset bundled:short --output_dir {output}"
        train(parse_train_config(flags.split()))
        shown = capsys.readouterr().out.partition("  question  ")[2]
        found.append((shown, [line["eval_exact_match"] for line in metrics_of(output) if "eval_exact_match" in line]))
    assert found[0] == found[1]
    before, after = found[0][1]
    assert before == 0 and after > 0.9


def test_a_prefix_bloom_ends_answers_where_the_tokenizer_or_else_the_training_of_the_prefix_does(
    odd_base, tuned, tokenizer, mixed, capsys
):
    base = BloomForCausalLM.from_pretrained(odd_base)
    base.generation_config.pad_token_id = None
    before, prompts = base.generation_config.to_dict(), mixed[0][:6]
    right = PrefixBloom(load_base(bundled.MODEL, torch.float32, CPU)[0])
    right.attach("short", load_prefix(tuned["short"]))
    expected = complete(right, tokenizer, prompts, **GREEDY)
    for given in (tokenizer, AutoTokenizer.from_pretrained(odd_base), None):
        model = PrefixBloom(base, given)
        assert ends_of(model.generation_config) == ([EOS, OTHER_END] if given else [OTHER_END])
        assert model.generation_config.pad_token_id == (given and (given.pad_token_id or EOS))
        capsys.readouterr()
        model.attach("short", load_prefix(tuned["short"]))
        said = "short: the tokenizer of its training ends a text with token 2, the base's generation_config with 7"
        assert (said in capsys.readouterr().err) == (given is None)
        model.attach("short", load_prefix(tuned["short"]))
        assert said not in capsys.readouterr().err and ends_of(model.generation_config) == [EOS, OTHER_END]
        assert complete(model, tokenizer, prompts, **GREEDY) == expected
    assert base.generation_config.to_dict() == before


def test_where_nothing_differs_nothing_is_said_or_changed(tokenizer, capsys):
    for ends in (EOS, [OTHER_END, EOS]):
        settings = GenerationConfig(eos_token_id=ends, pad_token_id=3)
        align_special_tokens(settings, tokenizer, "base")
        assert settings.eos_token_id == ends and settings.pad_token_id == 3
    settings = GenerationConfig()
    align_special_tokens(settings, tokenizer, "base")
    assert settings.eos_token_id == EOS and settings.pad_token_id == 3
    without = copy.deepcopy(tokenizer)
    without.eos_token = without.pad_token = None
    align_special_tokens(settings, without, "base")
    assert settings.eos_token_id == EOS and settings.pad_token_id == 3
    assert not capsys.readouterr().err


@pytest.mark.parametrize("special", [None, "</s>", [2], {}, {"eos": "</s>"}, {"eos": None}, {"eos": True}, {"eos": 10**9}])
def test_what_a_file_says_of_its_special_tokens_may_be_anything(special, tuned, base):
    prefix = load_prefix(tuned["short"])
    fingerprint = prefix.recorded_base | {"special_tokens": special}
    assert recorded_end(fingerprint) == (10**9 if special == {"eos": 10**9} else None)
    model = PrefixBloom(base)
    before = model.generation_config.eos_token_id
    model.attach("short", prefix._replace(recorded_base=fingerprint))
    assert model.generation_config.eos_token_id == before
