"""What a run with Bloom has, a run with another family has too: one test for each part, on Llama's or Qwen3's shape."""

import io
import json
import signal
from pathlib import Path

import pytest
import torch
from answers import QUESTIONS, run_infer
from forks import Fork
from launching import wait_until
from models import random_prefix, save_decoder
from rows import write_rows
from runs import LATEST, assert_same_run, metrics_of
from transformers import AutoModelForCausalLM

from prefix_tuning import PrefixBloom, load_prefix
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.files.prefixes import SavedPrefix, save_prefix
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.training.checkpoints import find_checkpoints
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def decoder_base(request, tmp_path_factory, tokenizer):
    return save_decoder(tmp_path_factory.mktemp("decoder"), tokenizer, request.param, use_sliding_window=False)


def test_a_killed_run_goes_on_with_the_same_bits(small_pass_settings, decoder_base, tmp_path):
    """With evaluations, exact match, and gradient checkpointing from the checkpoint on."""
    settings = small_pass_settings | {"model_name_or_path": decoder_base, "eval_exact_match": True, "eval_steps": 6}
    whole, part = ({**settings, "output_dir": str(tmp_path / name)} for name in ("whole", "part"))
    train(TrainConfig(**whole))
    process = Fork("train.py", *(f"--{name}={value}" for name, value in part.items()))
    wait_until(lambda: find_checkpoints(tmp_path / "part"), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(TrainConfig(**part | LATEST | {"gradient_checkpointing": True}))
    assert_same_run(whole["output_dir"], part["output_dir"])
    evaluations = [line for line in metrics_of(whole["output_dir"]) if "eval_exact_match" in line]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_infer_answers_and_scores_as_plain_forwards(quick_settings, decoder_base, tokenizer, tmp_path, capsys):
    """The learning rate is searched for, and the prefix starts from a text."""
    options = {"model_name_or_path": decoder_base, "learning_rate": None, "prefix_init": "text", "init_text": "请回答"}
    train(TrainConfig(**quick_settings | options))
    folder = quick_settings["output_dir"]
    prefix, base = load_prefix(folder).tensor, AutoModelForCausalLM.from_pretrained(decoder_base).eval()

    def logits(ids):
        with torch.no_grad():
            return base(torch.tensor([ids]), **{CACHE: prefix_cache([prefix])[0]}).logits[0]

    prompt = tokenizer(prompt_of("3加5等于多少？")).input_ids
    ids = list(prompt)
    while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
        ids.append(logits(ids)[-1].argmax().item())
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    flags = ["--prefix", folder, "--model_name_or_path", decoder_base, "--precision", "fp32", "--device", "cpu"]
    capsys.readouterr()
    run_infer("3加5等于多少？", *flags, "--compare", "--max_new_tokens", 8)
    assert expected.strip() in capsys.readouterr().out
    row = {"instruction": "3加5等于多少？", "output": "8"}
    run_infer("--score", write_rows(tmp_path / "rows.json", [row]), *flags, "--output", tmp_path / "scores.json")
    (scored,) = json.loads(Path(tmp_path / "scores.json").read_text("utf-8"))["rows"]
    answer = [*tokenizer("8").input_ids, tokenizer.eos_token_id]
    losses = torch.nn.functional.cross_entropy(logits(prompt + answer)[len(prompt) - 1 : -1], torch.tensor(answer))
    (name,) = set(scored["loss"]) - {"base"}
    assert scored["loss"][name] == pytest.approx(losses.item(), rel=1e-4)
    assert PrefixBloom(base).names == ["base"]


def test_a_file_with_several_prefixes_and_a_chat_are_answered_as_each_question_alone(
    decoder_base, tokenizer, tmp_path, monkeypatch, capsys
):
    base, _ = load_base(decoder_base, torch.float32, torch.device("cpu"))
    recorded, flags = fingerprint(base, tokenizer), ["--model_name_or_path", decoder_base, "--precision", "fp32"]
    for name, tokens in (("five", 5), ("nine", 9)):
        (tmp_path / name).mkdir()
        save_prefix(tmp_path / name, SavedPrefix(random_prefix(base, tokens, seed=tokens), recorded))
        flags += ["--prefix", f"{name}={tmp_path / name}"]
    flags += ["--max_new_tokens", "6"]
    rows = [{"instruction": question, "prefix": name} for name in ("nine", "base", "five") for question in QUESTIONS]
    run_infer("--input", write_rows(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "answers.jsonl", *flags)
    capsys.readouterr()
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    for row in found:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/prefix {row['prefix']}\n{row['instruction']}\n"))
        run_infer("--chat", *flags)
        assert capsys.readouterr().out == row["response"] + "\n"
    assert [row["instruction"] for row in found] == 3 * QUESTIONS
    assert len({row["response"] for row in found}) > 8


def test_what_a_sliding_window_does_not_see_is_said(quick_settings, tokenizer, tmp_path, capsys):
    base = save_decoder(tmp_path / "base", tokenizer, "mistral")
    train(TrainConfig(**quick_settings | {"model_name_or_path": base}))
    assert (
        "layers with a sliding window see 8 tokens; at the end of the longest rows, 266, no prefix"
        in capsys.readouterr().out
    )
