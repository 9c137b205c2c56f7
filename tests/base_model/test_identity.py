import copy
import os

import pytest
import torch
from models import random_bloom

from prefix_tuning import bundled
from prefix_tuning.base_model.identity import base_of, check_base, fingerprint, portable_name
from prefix_tuning.errors import UserError


def test_names_in_files_hold_on_any_machine(tmp_path, monkeypatch):
    assert portable_name("Langboat/bloom-1b4-zh") == "Langboat/bloom-1b4-zh"
    assert portable_name(bundled.MODEL) == bundled.MODEL
    assert portable_name(str(tmp_path)) == f"local:{tmp_path.name}"
    assert portable_name("/no/longer/there.jsonl") == "local:there.jsonl"
    monkeypatch.chdir(tmp_path)
    assert portable_name(".") == f"local:{tmp_path.name}"
    os.mkdir("名".encode("gbk"))
    os.chdir("名".encode("gbk"))
    assert portable_name(".") == "local:\ufffd\ufffd"
    assert base_of("./chatbot", "Langboat/bloom-1b4-zh") == "Langboat/bloom-1b4-zh"
    for recorded in (f"local:{tmp_path.name}", None, ""):
        with pytest.raises(UserError, match=r"\./chatbot: .*--model_name_or_path PATH"):
            base_of("./chatbot", recorded)


def test_a_prefix_is_used_on_its_own_base_only(tokenizer, capsys):
    model = random_bloom()
    base = fingerprint(model, tokenizer) | {"name_or_path": "base"}
    shape = (3, 2, 6, 5, 8)
    check_base(shape, base, base, "./chatbot", force=False)
    assert not capsys.readouterr().err
    for other in ((2, 2, 6, 5, 8), (3, 2, 3, 5, 16), (3, 2, 6, 5, 16)):
        with pytest.raises(UserError, match=r"\./chatbot: a prefix for .* but base has 3 layers of 6 x 8"):
            check_base(other, base, base, "./chatbot", force=True)
    # Only the name differs: a line says so, and the prefix is used.
    check_base(shape, base | {"name_or_path": "old"}, base, "./chatbot", force=False)
    assert "was trained on old; base has the same shape, but not the same name" in capsys.readouterr().err
    # Another program wrote only a name.
    check_base(shape, {"name_or_path": "old"}, base, "./chatbot", force=False)
    assert "it names old" in capsys.readouterr().err
    # A version that knew no special tokens recorded none.
    check_base(shape, {key: value for key, value in base.items() if key != "special_tokens"}, base, "./chatbot", force=False)
    assert not capsys.readouterr().err
    # The pad token does not matter, because padding is masked.
    padded = base | {"special_tokens": base["special_tokens"] | {"pad": None}}
    check_base(shape, padded, base, "./chatbot", force=False)
    check_base(shape, base, padded, "./chatbot", force=False)
    assert not capsys.readouterr().err
    for changed in ("weights", "tokenizer", "special_tokens"):
        said = f"not the same {changed.replace('_', ' ')}"
        with pytest.raises(UserError, match=f"{said}; use the right base, or add --force"):
            check_base(shape, base | {changed: "other"}, base, "./chatbot", force=False)
        check_base(shape, base | {changed: "other"}, base, "./chatbot", force=True)
        assert said in capsys.readouterr().err


def test_a_fingerprint_knows_weights_and_tokenizer_but_not_the_compute_type(tokenizer):
    model = random_bloom()
    base = fingerprint(model, tokenizer)
    assert fingerprint(random_bloom(dtype=torch.bfloat16), tokenizer) == base
    assert fingerprint(random_bloom(dtype=torch.float16), tokenizer) == base | {"weights": None}
    assert fingerprint(random_bloom(seed=1), tokenizer)["weights"] != base["weights"]
    for path, name in (("Langboat/bloom-1b4-zh", "Langboat/bloom-1b4-zh"), ("/models/base", "local:base"), ("", "")):
        model.name_or_path = path
        assert fingerprint(model, tokenizer) == base | {"name_or_path": name}
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["乐山大佛"])
    assert fingerprint(model, other) == base | {"tokenizer": fingerprint(model, other)["tokenizer"]} != base
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<pad>"
    assert fingerprint(model, other) == base | {"special_tokens": base["special_tokens"] | {"eos": 3}} != base


def test_a_fingerprint_knows_every_column():
    model = random_bloom(hidden_size=64, n_head=8, n_layer=1)
    attention, mlp = model.transformer.h[0].self_attention, model.transformer.h[0].mlp
    base = fingerprint(model, None)["weights"]
    for layer in (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, model.transformer.word_embeddings):
        for column in layer.weight.T:
            kept = column.clone()
            column += 1
            assert fingerprint(model, None)["weights"] != base
            column.copy_(kept)
    assert fingerprint(model, None)["weights"] == base


def test_a_fingerprint_stays_what_it_was():
    """Prefixes record it: if it changed, they would all be refused."""
    model = random_bloom(hidden_size=64, n_head=8, n_layer=1)
    for parameter in model.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 1000)
    assert fingerprint(model, None)["weights"][:16] == "1c8a20ff45e5b1ab"


@pytest.mark.filterwarnings("ignore")  # torch names a successor of this
def test_a_base_with_quantised_layers_is_another_one_which_can_be_used_by_force(tokenizer):
    model = random_bloom()
    base = fingerprint(model, tokenizer)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found = fingerprint(quantised, tokenizer)
    assert found["weights"] != base["weights"] and found | {"weights": None} == base | {"weights": None}
    with pytest.raises(UserError, match=r"not the same weights.*--force"):
        check_base((3, 2, 6, 5, 8), base, found, "./chatbot", force=False)
    check_base((3, 2, 6, 5, 8), base, found, "./chatbot", force=True)
