"""A prefix of an instruct model, from train.py to its answers: everything follows the chat template of its training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from answers import refuses, run_infer
from chats import CHATML, GEMMA, LLAMA, messages_of, with_template
from models import random_decoder
from rows import write_jsonl
from runs import LATEST, metrics_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.loading import ends_of
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.data.templates import ChatTemplate, prompt_of, talk_of
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_FILE, CARD_FILE
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.inference.ask import Answerer, ask
from prefix_tuning.inference.chat import Chat
from prefix_tuning.inference.run import decoding_options, open_model
from prefix_tuning.model.bloom import empty_prefix, prefix_cache
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

QUESTION, ANSWER = "五？", "好"
FLAGS = (
    "--max_steps 30 --learning_rate 0.01 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
    "--num_virtual_tokens 8 --precision fp32 --save_steps 30 --eval_exact_match true"
)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory, tokenizer):
    """The bundled base with ChatML's template, whose tokens get random embeddings. Its generation_config ends with EOS."""
    folder = tmp_path_factory.mktemp("chat") / "chat-base"
    chat, base = with_template(tokenizer, CHATML), BloomForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL))
    base.resize_token_embeddings(len(chat), mean_resizing=False)
    weights, old = base.get_input_embeddings().weight.data, len(tokenizer)
    torch.manual_seed(0)
    weights[old:] = torch.randn_like(weights[old:]) * weights[:old].std()
    base.save_pretrained(folder)
    chat.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat_tokenizer(chat_base):
    return AutoTokenizer.from_pretrained(chat_base)


@pytest.fixture(scope="module")
def trained_twice(chat_base, tmp_path_factory):
    """Two prefixes, which answer any question with ANSWER: one asked in the chat template, one in the notebook's. By name:
    the folder, and what the run has printed.
    """
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"{number}？", "output": ANSWER, "system": "短"} for number in "一二三四"]
    rows[0]["history"] = [["零？", ANSWER]]
    write_jsonl(folder / "rows.jsonl", *rows)
    write_jsonl(folder / "eval.jsonl", {"instruction": QUESTION, "output": ANSWER})
    for name in ("auto", "notebook"):
        flags = f"--model_name_or_path {chat_base} --dataset {folder}/rows.jsonl --eval_dataset {folder}/eval.jsonl"
        train(parse_train_config(f"{flags} --output_dir {folder}/{name} --template {name} {FLAGS}".split()))
    return folder


@pytest.fixture
def flags(trained_twice, chat_base):
    return ["--model_name_or_path", chat_base, "--precision", "fp32", "--prefix", f"chat={trained_twice}/auto"]


def asked(tokenizer, *texts):
    return tokenizer.apply_chat_template(messages_of(*texts), add_generation_prompt=True, return_dict=False)


def prompts_read(model, call):
    """The token ids of every text of more than one token that the model reads during the call."""
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].tolist()))
    call()
    hook.remove()
    return [row for rows in read for row in rows if len(row) > 1]


def test_answers_are_asked_in_the_template_and_stop_at_the_end_of_turn(trained_twice, chat_tokenizer, flags, capsys):
    evaluations = [line["eval_exact_match"] for line in metrics_of(trained_twice / "auto") if "eval_exact_match" in line]
    assert evaluations[-1] == 1  # a reply that goes on would be no match
    run_infer(QUESTION, *flags)
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (
        f"chat: its template ends a text with token {end}, the base's generation_config with 2: each ends an answer" in err
    )
    config = parse_infer_config([QUESTION, *flags])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    inputs = torch.tensor([asked(chat_tokenizer, QUESTION)])
    (reply,) = model.generate(inputs, max_new_tokens=20, do_sample=False)[:, inputs.shape[1] :].tolist()
    assert reply == [*tokenizer(ANSWER).input_ids, end]


def open_chat(*flags):
    config = parse_infer_config(["--chat", *map(str, flags)])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    return Chat(Answerer(model, tokenizer, decoding_options(config), 0), 256, config.compare, {"chat", "old", "base"})


def test_each_prefix_of_a_conversation_reads_its_own_template(trained_twice, chat_tokenizer, flags, capsys):
    chat = open_chat(*flags, "--prefix", f"old={trained_twice}/notebook", "--compare", "--max_new_tokens", 8)
    chat.answer("一？")
    assert chat.history == ["一？", ANSWER]
    read = prompts_read(chat.model, lambda: chat.answer(QUESTION))
    talk = asked(chat_tokenizer, "一？", ANSWER, QUESTION)
    old = chat_tokenizer(f"{prompt_of('一？')}{ANSWER}</s>{prompt_of(QUESTION)}").input_ids
    assert read == [talk, talk, old]  # base, chat, old
    assert chat.history == ["一？", ANSWER, QUESTION, ANSWER]
    assert re.search(f"\nchat  {ANSWER}\nold   {ANSWER}\n$", capsys.readouterr().out)


def test_the_rows_of_a_file_are_asked_in_the_template_of_their_prefix(trained_twice, flags, tmp_path, capsys):
    rows = [{"instruction": QUESTION, "prefix": name, "system": "短"} for name in ("chat", "old", "chat")]
    source, output = write_jsonl(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    run_infer("--input", source, "--output", output, *flags, "--prefix", f"old={trained_twice}/notebook")
    answers = [json.loads(line)["response"] for line in output.read_text("utf-8").splitlines()]
    assert answers == [ANSWER] * 3 and "no turn for a system text" not in capsys.readouterr().err


def test_a_llama_is_asked_in_its_template_too(quick_settings, tokenizer, tmp_path):
    chat, folder = with_template(tokenizer, LLAMA), str(tmp_path / "base")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    random_decoder("llama", vocab_size=len(chat), max_position_embeddings=512, **special).save_pretrained(folder)
    chat.save_pretrained(folder)
    train(TrainConfig(**quick_settings | {"model_name_or_path": folder}))
    config = parse_infer_config(["--model_name_or_path", folder, "--prefix", quick_settings["output_dir"], QUESTION])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    answerer = Answerer(model, tokenizer, decoding_options(config), 0)
    assert prompts_read(model, lambda: ask(answerer, QUESTION, None, compare=False)) == [asked(chat, QUESTION)]
    assert chat.convert_tokens_to_ids("<|eot_id|>") in ends_of(model.generation_config)


def test_scores_are_those_of_the_template(trained_twice, chat_base, chat_tokenizer, flags, tmp_path):
    source, output = write_jsonl(tmp_path / "a.jsonl", {"instruction": QUESTION, "output": ANSWER}), tmp_path / "scores.json"
    run_infer("--score", source, *flags, "--output", output)
    (row,) = json.loads(output.read_text("utf-8"))["rows"]
    template = ChatTemplate(chat_tokenizer.chat_template, enable_thinking=False)
    (example,) = take(tokenize(load_rows(source, ("train",)), chat_tokenizer, 256, template), [0])
    base = AutoModelForCausalLM.from_pretrained(chat_base).eval()
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
    for name, prefix in (("base", empty_prefix(base.config)), ("chat", load_prefix(str(trained_twice / "auto")).tensor)):
        with torch.no_grad():
            logits = base(ids, **{CACHE: prefix_cache([prefix])[0]}).logits[0, :-1]
        assert row["loss"][name] == pytest.approx(F.cross_entropy(logits, labels[1:]).item(), rel=1e-4)
    both = [*flags, "--prefix", f"old={trained_twice}/notebook"]
    refuses(
        "chat and old were trained in different templates, so they read different tokens; take one", "--score", source, *both
    )


def test_the_card_says_how_to_ask(trained_twice, chat_base, chat_tokenizer):
    card = (trained_twice / "auto" / CARD_FILE).read_text("utf-8")
    code = "\n".join(line.removeprefix("    ") for line in card.splitlines() if line.startswith("    "))
    code = code[code.index("from transformers import AutoTokenizer") : code.index("python infer.py")]
    names: dict = {}
    exec(code.replace("the folder of chat-base", chat_base), names)
    assert names["inputs"].input_ids.tolist() == [asked(chat_tokenizer, "法国的首都是哪里？")]
    assert "Human: " not in card
    old = (trained_twice / "notebook" / CARD_FILE).read_text("utf-8")
    assert "    Human: 法国的首都是哪里？\n\n    Assistant: \n" in old and "apply_chat_template" not in old


def record_of(folder):
    with safe_open(Path(folder) / ADAPTER_FILE, "pt") as file:
        return file.metadata()


def test_a_prefix_without_a_record_was_trained_in_the_notebook_s_template(
    trained_twice, chat_base, chat_tokenizer, tmp_path, capsys
):
    shutil.copytree(trained_twice / "notebook", tmp_path / "older")
    metadata = record_of(tmp_path / "older")
    assert metadata.pop("template") == "null"
    save_file(load_file(tmp_path / "older" / ADAPTER_FILE), tmp_path / "older" / ADAPTER_FILE, metadata)
    flags = ["--model_name_or_path", chat_base, "--precision", "fp32", "--prefix", str(tmp_path / "older")]
    run_infer(QUESTION, *flags)
    assert capsys.readouterr().out == ANSWER + "\n"
    config = parse_infer_config([QUESTION, *flags])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    answerer = Answerer(model, tokenizer, decoding_options(config), 0)
    read = prompts_read(model, lambda: ask(answerer, QUESTION, None, compare=True))
    assert read == [chat_tokenizer(prompt_of(QUESTION)).input_ids] * 2


def with_record(folder, copy, template):
    """A copy of a prefix whose file records another template."""
    shutil.copytree(folder, copy)
    metadata = record_of(copy) | {"template": json.dumps(template)}
    save_file(load_file(copy / ADAPTER_FILE), copy / ADAPTER_FILE, metadata)
    return copy


def test_the_record_decides_not_the_tokenizer_of_today(trained_twice, chat_base, chat_tokenizer, tmp_path, capsys):
    """Gemma's template has no turn for a system text."""
    template = {"chat_template": GEMMA, "enable_thinking": False}
    copy = with_record(trained_twice / "auto", tmp_path / "gemma", template)
    row = {"instruction": QUESTION, "output": ANSWER, "system": "短"}
    rows, flags = write_jsonl(tmp_path / "in.jsonl", row), ["--model_name_or_path", chat_base, "--prefix", copy]
    line = (
        "the chat template has no turn for a system text: it is put in front of the user's first text, with an empty line\n"
    )
    for task in (["--input", rows, "--output", tmp_path / "out.jsonl", "--max_new_tokens", 3], ["--score", rows]):
        run_infer(*task, *flags)
        assert capsys.readouterr().err.count(line) == 1
    config = parse_infer_config([QUESTION, *map(str, flags)])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    prompt = Answerer(model, tokenizer, decoding_options(config), 0).prompt(talk_of(QUESTION, system="短"), "gemma")
    expected = "<s><start_of_turn>user\n短\n\n五？<end_of_turn>\n<start_of_turn>model\n"
    assert chat_tokenizer.decode(prompt) == expected
    assert chat_tokenizer.convert_tokens_to_ids("<end_of_turn>") in ends_of(model.generation_config)


BAD_RECORDS = {
    "no object": ("chat", "adapter_model.safetensors: holds no valid template: 'chat'"),
    "other keys": ({"name": "chat"}, "bad: its file holds no valid template: {'name': 'chat'}"),
    "no end": (
        {"chat_template": "x", "enable_thinking": True},
        "bad: the chat template writes no special token after an ans",
    ),
}


@pytest.mark.parametrize("record, message", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_record_that_cannot_be_used_is_one_line(trained_twice, chat_base, tmp_path, record, message):
    copy = with_record(trained_twice / "auto", tmp_path / "bad", record)
    refuses(message, QUESTION, "--model_name_or_path", chat_base, "--prefix", copy)


def test_a_saved_prefix_keeps_its_template(trained_twice, chat_base, tmp_path):
    model = PrefixBloom(AutoModelForCausalLM.from_pretrained(chat_base))
    model.attach("chat", load_prefix(str(trained_twice / "auto")))
    model.save_pretrained(tmp_path)
    template = json.loads(record_of(tmp_path / "chat")["template"])
    assert template == json.loads(record_of(trained_twice / "auto")["template"])
    assert template == {"chat_template": CHATML, "enable_thinking": False}


def test_a_resumed_run_has_the_template_that_it_had(trained_twice, chat_base, tmp_path, capsys):
    shutil.copytree(trained_twice / "auto", tmp_path / "auto")
    flags = (
        f"--model_name_or_path {chat_base} --dataset {trained_twice}/rows.jsonl --eval_dataset {trained_twice}/eval.jsonl"
    )
    flags += (
        f" --output_dir {tmp_path}/auto {FLAGS} --max_steps 31 --resume_from_checkpoint {LATEST['resume_from_checkpoint']}"
    )
    with pytest.raises(UserError, match="was made with --template chat, not unset; another --dataset"):
        train(parse_train_config([*flags.split(), "--template", "notebook"]))
    train(parse_train_config([*flags.split(), "--template", "chat"]))
    assert "resuming after step 30" in capsys.readouterr().out
    flags = (
        f"--model_name_or_path {chat_base} --dataset {trained_twice}/rows.jsonl --output_dir {tmp_path}/new --max_steps 1"
    )
    train(parse_train_config([*flags.split(), "--prefix_from", f"{trained_twice}/notebook", "--learning_rate", "0.1"]))
    assert "notebook was trained in another template than this run, which --template decides" in capsys.readouterr().out


def test_a_base_without_a_chat_template_is_refused_before_anything_is_written(quick_settings, tmp_path):
    config = parse_train_config(["--template", "chat", "--output_dir", str(tmp_path / "out"), "--learning_rate", "1"])
    with pytest.raises(UserError, match=r"^--template chat: the tokenizer of .* has no chat template; leave the flag out$"):
        train(config)
    assert not [*(tmp_path / "out").glob("*")]
