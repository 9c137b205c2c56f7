"""Input from strangers: files that are broken or mean harm, and text that hurts. Never a traceback, a hang or a pickle."""

import contextlib
import json
import os
import pickle
import resource
import struct

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from answers import complete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import prefix_config, random_bloom, training_state
from safetensors.torch import save_file

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data import readers
from prefix_tuning.data.columns import COLUMNS, Columns
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import read_questions
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder, load_prefix, save_adapter, save_encoder
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.checkpoints import (
    check_same_run,
    find_resumed,
    load_checkpoint,
    metrics_so_far,
    restore,
    save_checkpoint,
)
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

CPU = torch.device("cpu")
fuzz = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    # A busy machine is no fault of the examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
absurd_numbers = st.sampled_from([0, -1, 1, 2, 10, 2**31, 2**63, 2**70, 10**30, 1.5, 1e308, "3", None, True, [], {}])


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with a few bytes changed, cut out or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(["flip", "cut", "truncate", "insert"]))
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at : at + draw(st.integers(1, 30))]
        elif kind == "truncate":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(max_size=8))
    return bytes(changed)


def read_or_refuse(read, *arguments):
    """Either it can be read or the user is told; any other exception is a failure."""
    try:
        return read(*arguments)
    except UserError as error:
        assert str(error)
        return None


@pytest.fixture
def saved(tmp_path):
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model))
    save_encoder(tmp_path, encoder, {"name_or_path": bundled.MODEL})
    save_adapter(tmp_path, encoder.bake(), encoder.config, {"name_or_path": bundled.MODEL})
    return tmp_path


def safetensors_with(header: object, body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@fuzz
@given(chosen=st.data())
def test_any_adapter_config(saved, chosen):
    valid = json.loads((saved / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    kind = chosen.draw(st.sampled_from(["number", "value", "bytes"]))
    if kind == "bytes":
        content = chosen.draw(damaged(json.dumps(valid).encode()))
    else:
        values = absurd_numbers if kind == "number" else json_values
        content = json.dumps(valid | {chosen.draw(st.sampled_from(sorted(valid))): chosen.draw(values)}).encode()
    before = (saved / ADAPTER_CONFIG_FILE).read_bytes()
    (saved / ADAPTER_CONFIG_FILE).write_bytes(content)
    found = read_or_refuse(load_prefix, str(saved))
    (saved / ADAPTER_CONFIG_FILE).write_bytes(before)
    assert found is None or found[0].shape == (3, 2, 6, 5, 8) or found[0].numel() == 3 * 2 * 6 * 5 * 8


@pytest.mark.parametrize("name, load", [(ADAPTER_FILE, load_prefix), (ENCODER_FILE, load_encoder)])
@fuzz
@given(chosen=st.data())
def test_any_safetensors_file(saved, chosen, name, load):
    before = (saved / name).read_bytes()
    (saved / name).write_bytes(chosen.draw(damaged(before[:1500]).map(lambda head: head + before[1500:])))
    read_or_refuse(load, str(saved))
    (saved / name).write_bytes(before)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        safetensors_with({}, length=2**62),  # a header of exabytes
        safetensors_with({"prompt_embeddings": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}),
        safetensors_with({"prompt_embeddings": {"dtype": "F32", "shape": [-1, 16], "data_offsets": [0, 64]}}),
        safetensors_with({"prompt_embeddings": {"dtype": "F32", "shape": [1, 16], "data_offsets": [64, 0]}}),
        safetensors_with({"../../etc/passwd": {"dtype": "F32", "shape": [1, 16], "data_offsets": [0, 64]}}),
        safetensors_with({"prompt_embeddings": {"dtype": "I64", "shape": [8], "data_offsets": [0, 64]}}),
        safetensors_with([1, 2, 3]),
        pickle.dumps({"prompt_embeddings": [1.0]}),
    ],
)
def test_safetensors_that_promise_what_they_do_not_hold(saved, content):
    for name, load in ((ADAPTER_FILE, load_prefix), (ENCODER_FILE, load_encoder)):
        (saved / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load(str(saved))
    (saved / "checkpoint-1.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-1\.safetensors"):
        load_checkpoint(saved / "checkpoint-1.safetensors")


def test_an_encoder_that_claims_terabytes_is_refused_before_anything_is_allocated(saved):
    config = {"num_virtual_tokens": 10, "num_layers": 10**6, "num_attention_heads": 8, "token_dim": 10**6}
    metadata = {"prefix_config": json.dumps(config | {"encoder_hidden_size": 10**6, "prefix_projection": True})}
    save_file({"embedding.weight": torch.zeros(1)}, saved / ENCODER_FILE, metadata)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        load_encoder(str(saved))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.parametrize(
    "suffix, reader", [(".jsonl", readers._read_json), (".json", readers._read_json), (".csv", readers._read_csv)]
)
@fuzz
@given(chosen=st.data())
def test_any_dataset_file(tmp_path, chosen, suffix, reader):
    row = {"instruction": "法国的首都是哪里？", "input": 'a,"b"', "output": "巴黎\n"}
    valid = {
        ".jsonl": json.dumps(row) + "\n" + json.dumps(row, ensure_ascii=False) + "\n",
        ".json": json.dumps([row, row], indent=1, ensure_ascii=False),
        ".csv": 'instruction,input,output\r\n法国的首都是哪里？,"a,""b""",巴黎\r\n',
    }[suffix].encode()
    strange = json_values.map(lambda value: json.dumps(value).encode())
    content = chosen.draw(st.binary(max_size=200) | damaged(valid) | strange)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    own = Columns({name: name for name in COLUMNS}, answered=True)
    rows = read_or_refuse(lambda: list(readers._checked("rows", reader("rows", str(path)), own.read)))
    for found in rows or []:
        assert found.keys() == {*COLUMNS, "system", "history", "weights"} and found["history"] == found["weights"] == []
        assert all(isinstance(found[name], str) and found[name].encode("utf-8") is not None for name in COLUMNS)


messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "", None]) | json_values,
        "content": st.text(max_size=8) | json_values,
        "from": st.sampled_from(["human", "gpt", "system"]) | json_values,
        "value": st.text(max_size=8) | json_values,
    },
)


@settings(fuzz, max_examples=300)
@given(column=st.sampled_from(["messages", "conversations"]), talks=st.lists(json_values | st.lists(messages), min_size=1))
def test_any_talks(tmp_path, column, talks):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({column: talk}) + "\n" for talk in talks), "utf-8")
    read = Columns({"messages": column}, answered=True)
    for found in (
        read_or_refuse(lambda: list(readers._checked("rows", readers._read_json("rows", str(path)), read.read))) or []
    ):
        assert found["output"].strip() and len(found["history"]) % 2 == 0
        assert all(isinstance(text, str) for text in [found["instruction"], found["input"], *found["history"]])
    asked = read_or_refuse(lambda: list(read_questions(str(path), [])))
    for _, talk, _ in asked or []:
        assert len(talk.texts) % 2 == 1 and all(isinstance(text, str) for text in [talk.system, *talk.texts])


HOSTILE_TALKS = {
    "deep nesting": '{"messages": ' + '{"a": ' * 400 + "1" + "}" * 400 + "}",
    "deeper than JSON is read": '{"messages": ' + "[" * 100_000,
    "deep nesting as message": '{"messages": ' + "[" * 400 + "]" * 400 + "}",
    "deep nesting as content": '{"messages": [{"role": "user", "content": ' + "[" * 400 + "]" * 400 + "}]}",
    "deep nesting as role": '{"conversations": [{"from": ' + '{"a": ' * 400 + "1" + "}" * 400 + ', "value": "a"}]}',
    "null content": '{"messages": [{"role": "user", "content": null}]}',
    "null talk": '{"messages": null}',
    "an object": '{"messages": {"role": "user", "content": "a"}}',
    "a number of 5,000 digits": '{"messages": ' + "9" * 5000 + "}",
    "a role that is no number": '{"messages": [{"role": NaN, "content": "a"}]}',
    "a role twice": '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
    "a long column": json.dumps({"x" * 100_000: 1, "messages\n": []}),
    "half a character as a column": '{"\\ud83d": 1}',
    "half a character as a role": '{"messages": [{"role": "\\ud83d", "content": "a"}]}',
    "a terminal's control sequence as role": '{"messages": [{"role": "\\u001b[2J", "content": "a"}]}',
}


@pytest.mark.parametrize("line", HOSTILE_TALKS.values(), ids=HOSTILE_TALKS)
def test_a_hostile_talk_is_one_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line, "utf-8")
    for read in (lambda: load_rows(str(path), ("train",)), lambda: list(read_questions(str(path), []))):
        with pytest.raises(UserError, match=r"rows\.jsonl, line 1: ") as refusal:
            read()
        message = str(refusal.value)
        assert len(message) < 1000 and message.isprintable() and message.encode("utf-8")


def test_a_talk_that_is_nested_as_deeply_as_json_can_be_is_one_line(tmp_path):
    read = Columns({"messages": "messages"}, answered=True)
    for depth in range(500, 1000):
        (tmp_path / "rows.jsonl").write_text('{"messages": ' + '{"a": ' * depth + "1" + "}" * depth + "}", "utf-8")
        with pytest.raises(UserError, match=r"^rows, line 1: "):
            list(readers._checked("rows", readers._read_json("rows", str(tmp_path / "rows.jsonl")), read.read))


@pytest.mark.parametrize("talk", [[1, 2], ["a"], [[]], [{"role": 1, "content": 2}], [{"x": "y"}], [None], 5, "a", [b"a"]])
def test_a_hostile_talk_in_parquet_is_one_line(tmp_path, talk):
    pyarrow.parquet.write_table(pa.table({"messages": [talk]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: "):
        load_rows(str(tmp_path / "rows.parquet"), ("train",))


@pytest.fixture(scope="module")
def shape():
    return prefix_config(random_bloom(), projection=False)


@settings(fuzz, max_examples=200)
@given(chosen=st.data())
def test_any_state_of_a_checkpoint(shape, tmp_path, chosen):
    """With a right checksum, as only somebody who means harm would write it."""
    encoder = PrefixEncoder(shape)
    path = str(tmp_path / "checkpoint-1.safetensors")
    (tmp_path / "out").mkdir(exist_ok=True)
    state = training_state(encoder)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    numbers = {"run": {"seed": 42}, "metrics_bytes": 0, **state.numbers()}
    where = chosen.draw(st.sampled_from([*numbers, "progress.step", "progress.best_loss", "all"]))
    value = chosen.draw(json_values)
    if where == "all":
        numbers = value
    elif "." in where:
        numbers["progress"][where.split(".")[1]] = value
    else:
        numbers[where] = value
    tensors = state.tensors()
    if chosen.draw(st.booleans()):
        tensors[chosen.draw(st.sampled_from(sorted(tensors)))] = torch.zeros(chosen.draw(st.integers(0, 3)))
    save_checkpoint(tmp_path, 1, tensors, numbers, None)

    def resume():
        resumed = find_resumed(tmp_path / "out", path, overwrite=False)
        check_same_run(resumed, {"seed": 42})
        assert isinstance(metrics_so_far(resumed), bytes)
        restore(training_state(resumed.encoder()), resumed)

    read_or_refuse(resume)


@pytest.fixture
def base(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


class Harm:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickled_base_is_read_without_running_it(base, tmp_path, capsys):
    weights = random_bloom().state_dict()
    (base / "model.safetensors").unlink()
    torch.save({name: tensor.clone() for name, tensor in weights.items()}, base / "pytorch_model.bin")
    model, _ = load_base(str(base), torch.float32, CPU)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert "safetensors is the safer format" in capsys.readouterr().err
    torch.save(weights | {"harm": Harm(tmp_path / "harmed")}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(base), torch.float32, CPU)
    assert not (tmp_path / "harmed").exists()


def test_code_that_comes_with_a_base_is_not_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # were the user asked
    config = json.loads((base / "config.json").read_text("utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    (base / "harm.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harmed')!r})\n", "utf-8")
    with pytest.raises(UserError):
        load_base(str(base), torch.float32, CPU)
    assert not (tmp_path / "harmed").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # were the user asked
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["harm.Mine", "harm.Mine"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (base / "harm.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harmed')!r})\n", "utf-8")
    with contextlib.suppress(UserError):
        load_base(str(base), torch.float32, CPU)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@settings(fuzz, max_examples=25)
@given(chosen=st.data())
def test_any_damage_to_a_base(base, chosen, name):
    before = (base / name).read_bytes()
    (base / name).write_bytes(chosen.draw(damaged(before[:3000]).map(lambda head: head + before[3000:])))
    read_or_refuse(load_base, str(base), torch.float32, CPU)
    (base / name).write_bytes(before)


HURTING = [
    "",
    " \t\n",
    "nul \0 nul",
    "ترجم إلى الصينية \u202e abc",
    "e\u0301\u0300\u0302" * 20,
    "👩‍👩‍👧‍👦" * 10,
    "\ufeffBOM",
    "a\r\nb\rc",
    "</s><pad><s><unk>",
    "Human: x\n\nAssistant: y",
    "长" * 333_333,  # a million characters in the row
]


@pytest.mark.parametrize("text", HURTING, ids=lambda text: repr(text[:12]))
def test_text_that_hurts_trains_and_answers(base, tmp_path, tokenizer, text):
    row = {"instruction": text, "input": text, "output": text + "。"}
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"instruction": "b", "input": ""}), "utf-8"
    )
    output = str(tmp_path / "out")
    train(TrainConfig(str(base), dataset=str(tmp_path / "rows.jsonl"), output_dir=output, device="cpu", max_steps=1))
    prefix, _ = load_prefix(output)
    model, _ = load_base(str(base), torch.float32, CPU)
    model = PrefixBloom(model, tokenizer)
    model.attach("prefix", prefix)
    (answer,) = complete(model, tokenizer, [prompt_of(text[:500])], max_new_tokens=3, do_sample=False)
    assert isinstance(answer, str)
