import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import examples_of, prefix_config, random_bloom
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from prefix_tuning.base_model.loading import load_base
from prefix_tuning.devices import held_per_token, is_out_of_memory, resolve_device, resolve_dtype, suggested_max_tokens
from prefix_tuning.errors import UserError
from prefix_tuning.model import attention, bloom
from prefix_tuning.model.batch import IGNORED, Example, pack
from prefix_tuning.model.bloom import block_runner, label_losses, packed_hidden, prefix_cache, run_block
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.start import text_prefix

RAGGED = {
    "ragged rows": ([7, 1, 12, 9, 30], 0.5),
    "one row": ([17], 0.5),
    "rows of one token": ([1, 1, 2], 0.0),
    "equal rows": ([8, 8, 8], 0.5),
    "prompts longer than answers": ([20, 33, 25], 0.9),
    "two tokens": ([2, 2], 0.5),
}
OPTIONS = {
    "bloom": {},
    "residual after the layer norm": {"apply_residual_connection_post_layernorm": True},
    "a power of two heads": {"n_head": 8},
    "one head": {"n_head": 1},
    "pretraining_tp": {"pretraining_tp": 2},
}


def plain_loss(model, examples, prefix):
    """The plain twin: transformers' own forward, row by row, the prefix as past_key_values. Summed cross-entropy."""
    total = 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        cache, length = None, ids.shape[1]
        if prefix is not None:
            cache, length = prefix_cache([prefix.to(model.dtype)])[0], ids.shape[1] + prefix.shape[3]
        logits = model(ids, past_key_values=cache, attention_mask=torch.ones(1, length, dtype=torch.long)).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        if len(labels):
            total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return total


def plain_float64_loss(model, examples, prefix):
    """The plain twin where transformers' own, whose softmax is float32, is not exact enough: the equations, one by one."""
    shape, body = model.config, model.transformer
    heads, size = shape.n_head, shape.hidden_size // shape.n_head
    total = 0
    for example in examples:
        hidden = body.word_embeddings_layernorm(body.word_embeddings(torch.tensor(example.input_ids)))
        seen = prefix.shape[3] + len(hidden)
        future = torch.arange(seen) > torch.arange(prefix.shape[3], seen)[:, None]
        slopes = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, :, 1:]
        alibi = slopes.double() * torch.arange(seen)
        for layer, (past_key, past_value) in zip(body.h, prefix, strict=True):
            normed = layer.input_layernorm(hidden)
            residual = normed if shape.apply_residual_connection_post_layernorm else hidden
            qkv = layer.self_attention.query_key_value(normed).view(len(hidden), heads, 3, size)
            query, key, value = (qkv[:, :, i].transpose(0, 1) for i in range(3))
            key, value = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
            scores = query @ key.transpose(1, 2) / math.sqrt(size) + alibi
            context = scores.masked_fill(future, -math.inf).softmax(-1) @ value
            hidden = layer.self_attention.dense(context.transpose(0, 1).flatten(1)) + residual
            normed = layer.post_attention_layernorm(hidden)
            residual = normed if shape.apply_residual_connection_post_layernorm else hidden
            inner = layer.mlp.dense_h_to_4h(normed)
            inner = inner * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * inner * (1 + 0.044715 * inner * inner)))
            hidden = layer.mlp.dense_4h_to_h(inner) + residual
        scores = model.lm_head(body.ln_f(hidden))[:-1]
        labels = torch.tensor(example.labels[1:])
        if len(labels):
            total = total + F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED)
    return total


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(params=["rows", "rows in pieces", "grid"])
def attention_form(request, monkeypatch):
    """Every form of attention: row by row, the same where rows are long, and as a padded grid."""
    if request.param == "rows in pieces":
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    grid = request.param == "grid"
    monkeypatch.setattr(bloom, "attend", (lambda *x: attention.attend_padded(*x[:-1])) if grid else attention.attend_rows)


def packed_loss(model, examples, prefix):
    return sum(label_losses(model, batch, prefix).sum() for batch in pack(examples, 40))


def loss_and_gradient(loss_of, prefix):
    leaf = prefix.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.item(), leaf.grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths, prompt_share", RAGGED.values(), ids=RAGGED)
def test_packed_loss_and_prefix_gradient_equal_transformers(attention_form, options, lengths, prompt_share):
    model = random_bloom(**options)
    examples = examples_of(lengths, prompt_share=prompt_share)
    prefix = PrefixEncoder(prefix_config(model)).bake()
    ours, our_gradient = loss_and_gradient(lambda x: packed_loss(model, examples, x), prefix)
    theirs, their_gradient = loss_and_gradient(lambda x: plain_loss(model, examples, x), prefix)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert relative(our_gradient, their_gradient) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_float64_the_packed_forward_equals_the_equations(attention_form, options, monkeypatch):
    monkeypatch.setattr(bloom._FrozenHeadLoss, "LABELS_AT_ONCE", 7)
    model = random_bloom(dtype=torch.float64, **options)
    examples = examples_of([7, 1, 12, 9, 30])
    prefix = PrefixEncoder(prefix_config(model)).bake().double()
    ours, our_gradient = loss_and_gradient(lambda x: packed_loss(model, examples, x), prefix)
    theirs, their_gradient = loss_and_gradient(lambda x: plain_float64_loss(model, examples, x), prefix)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert relative(our_gradient, their_gradient) < 1e-12


def test_logits_equal_transformers_and_stand_where_the_labels_are():
    model = random_bloom()
    prefix = PrefixEncoder(prefix_config(model)).bake()
    example = examples_of([9])[0]
    (batch,) = pack([example], 100)
    cache = prefix_cache([prefix.to(model.dtype)])[0]
    logits = model(torch.tensor([example.input_ids]), past_key_values=cache, attention_mask=torch.ones(1, 14)).logits[0]
    positions = [i for i in range(8) if example.labels[i + 1] != IGNORED]
    ours = model.lm_head(packed_hidden(model, batch, prefix))
    assert relative(ours, logits[positions]) < 1e-5
    assert batch.labels.tolist() == [example.labels[i + 1] for i in positions]


def test_without_a_prefix_it_is_the_base(attention_form):
    model, examples = random_bloom(), examples_of([7, 12])
    loss = sum(label_losses(model, batch, None).sum() for batch in pack(examples, 100))
    assert loss.item() == pytest.approx(plain_loss(model, examples, None).item(), rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_checkpointing_gives_the_same_bits(attention_form, options):
    model, examples = random_bloom(**options), examples_of([7, 12, 30])
    prefix, results = PrefixEncoder(prefix_config(model)).bake(), []
    for checkpointing in (False, True):
        leaf = prefix.clone().requires_grad_()
        loss = sum(label_losses(model, batch, leaf, block_runner(checkpointing)).sum() for batch in pack(examples, 40))
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_each_label_counts_by_its_weight():
    model, (batch,) = random_bloom(), pack(examples_of([7, 12]), 100)
    prefix, labels = PrefixEncoder(prefix_config(model)).bake(), range(len(batch.labels))
    _, whole = loss_and_gradient(lambda x: (label_losses(model, batch, x) * torch.arange(len(labels))).sum(), prefix)
    parts = [loss_and_gradient(lambda x, i=i: label_losses(model, batch, x)[i], prefix)[1] for i in labels]
    assert relative(sum(i * parts[i] for i in labels), whole) < 1e-5
    assert block_runner() is run_block  # nothing is computed twice unless that is asked for


def test_bfloat16_stays_close_to_float32(attention_form):
    model = random_bloom()
    examples, prefix = examples_of([7, 12, 30]), PrefixEncoder(prefix_config(model)).bake()
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = prefix.clone().requires_grad_()
        sum(label_losses(copy.deepcopy(model).to(dtype), batch, leaf).sum() for batch in pack(examples, 100)).backward()
        gradients.append(leaf.grad)
    assert gradients[1].dtype == torch.float32
    assert relative(gradients[1], gradients[0]) < 2e-2


def test_gradients_reach_no_parameter_of_the_base():
    model = random_bloom()
    leaf = PrefixEncoder(prefix_config(model)).bake().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batch in pack(examples_of([7, 12]), 100):
        label_losses(model, batch, leaf).sum().backward()
    assert leaf.grad.any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_text_prefix_is_what_the_model_computes_for_the_text(tokenizer):
    model = random_bloom()
    ids = tokenizer("法国的首都是巴黎。").input_ids
    prefix = text_prefix(model, tokenizer, "法国的首都是巴黎。", len(ids))
    assert prefix.shape == (3, 2, 6, len(ids), 8)
    # A prefix made of the text's own keys and values continues exactly as the text itself does.
    rest = torch.tensor([[50, 60, 70]])
    after_text = model(torch.cat((torch.tensor([ids]), rest), dim=1)).logits[0, -3:]
    cache = prefix_cache([prefix.to(model.dtype)])[0]
    after_prefix = model(rest, past_key_values=cache, attention_mask=torch.ones(1, len(ids) + 3)).logits[0]
    assert relative(after_prefix, after_text) < 1e-5
    # Cut or repeated to the length that is asked for.
    assert relative(text_prefix(model, tokenizer, "法国的首都是巴黎。", 2), prefix[:, :, :, :2]) < 1e-5
    assert text_prefix(model, tokenizer, "法", 7).shape[3] == 7
    with pytest.raises(UserError, match="init_text"):
        text_prefix(model, tokenizer, "", 7)


def test_the_base_is_frozen_and_in_the_compute_type(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_base(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert loaded.padding_side == "left"


def test_a_base_that_is_none_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="model_name_or_path no/such-model"):
        load_base("no/such-model", torch.float32, torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_base(str(tmp_path / "empty"), torch.float32, torch.device("cpu"))
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_base_with_broken_or_missing_weights_is_refused(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not a view of the file
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    save_file({name: tensor for name, tensor in weights.items() if "h.1." not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match="of its weights"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    save_file({name: tensor[:2].contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))


def resave(folder, change):
    """Changes the JSON of a saved tokenizer."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


@pytest.mark.parametrize("parts", [None, 1])
def test_a_tokenizer_that_does_not_serve_is_refused(tmp_path, tokenizer, parts):
    def refused(folder, match):
        with pytest.raises(UserError, match=rf"--model_name_or_path .*{folder.name}: its tokenizer {match}"):
            load_base(str(folder), torch.float32, torch.device("cpu"), parts)

    for name, size in (("small", len(tokenizer) - 1), ("no_eos", len(tokenizer)), ("slow", 384)):
        random_bloom(vocab_size=size).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    refused(tmp_path / "small", "has 4096 tokens, .* 4095")
    resave(tmp_path / "no_eos", lambda settings: settings | {"eos_token": None})
    refused(tmp_path / "no_eos", "has no EOS token")
    (tmp_path / "slow" / "tokenizer.json").unlink()
    resave(tmp_path / "slow", lambda settings: {"tokenizer_class": "ByT5Tokenizer"})
    refused(tmp_path / "slow", "has no tokenizer.json")


def test_a_base_may_have_more_embeddings_than_tokens(tmp_path, tokenizer):
    random_bloom(vocab_size=len(tokenizer) + 100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    assert model.config.vocab_size == len(tokenizer) + 100


def test_device_and_precision():
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        resolve_dtype("fp16", cpu)
    assert resolve_device("cpu") == cpu
    for name in ("nonsense", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            resolve_device("cuda")


def test_a_row_without_labels_costs_nothing():
    (batch,) = pack([Example([5, 6, 7], [IGNORED] * 3)], 100)
    assert label_losses(random_bloom(), batch, None).sum().item() == 0


def test_a_head_that_is_trained_is_refused_as_it_would_get_no_gradient():
    (batch,) = pack(examples_of([7, 12]), 100)
    with pytest.raises(ValueError, match="must be frozen"):
        label_losses(random_bloom().requires_grad_(), batch, None)


@pytest.mark.parametrize(
    "lengths, form", [([47, 48], "padded"), ([48, 48], "rows"), ([90, 7], "rows"), ([90, 7, 9], "padded"), ([47], "padded")]
)
def test_on_a_cpu_rows_that_are_long_on_average_go_one_by_one(monkeypatch, lengths, form):
    called = []
    for name in ("padded", "rows"):
        real = getattr(attention, f"attend_{name}")
        monkeypatch.setattr(attention, f"attend_{name}", lambda *x, n=name, real=real: called.append(n) or real(*x))
    (batch,) = pack(examples_of(lengths), 1000)
    label_losses(random_bloom(n_layer=1), batch, None)
    assert called == [form]


def test_several_processes_take_a_cuda_device_each_and_share_no_other(monkeypatch):
    """As far as it can be seen without such a device: by the name of the one that is missing."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there are such devices here")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert resolve_device("auto") == torch.device("cpu")
        assert resolve_device("cpu") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda:1 is not available"):
            resolve_device("cuda")
    with pytest.raises(UserError, match="--device mps cannot be shared"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cpu")
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable)
    for name in ("auto", "mps"):
        with pytest.raises(UserError, match="--device mps is not available"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cuda:0 is not available"):
        resolve_device("auto")


def test_on_cuda_the_precision_is_what_the_device_has_units_for(monkeypatch):
    cuda = torch.device("cuda")
    for major, dtype in ((7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major))
        assert resolve_dtype("auto", cuda) == dtype
    assert resolve_dtype("fp16", cuda) == torch.float16
    assert resolve_dtype("fp32", cuda) == torch.float32


def test_tokens_of_a_pass_stay_within_the_memory_meant_for_it():
    model = random_bloom()
    assert held_per_token(model) == 10 * 48 * 3 * 4 and held_per_token(model.bfloat16()) == 10 * 48 * 3 * 2
    assert suggested_max_tokens(model, gathers=False) == 640
    model = random_bloom()
    model.config.n_layer = 1000  # a deep one, as far as its configuration is asked
    held = 10 * 48 * 1000 * 4
    assert suggested_max_tokens(model, gathers=False) == 2**29 // held < 640
    elsewhere = model.to("meta")  # any device but a CPU
    assert suggested_max_tokens(elsewhere, gathers=False) == 2**31 // held > 640
    assert suggested_max_tokens(elsewhere, gathers=True) == 2**33 // held
    model.config.n_layer = 2**30
    assert suggested_max_tokens(elsewhere, gathers=False) == 1


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    assert all(is_out_of_memory(error) for error in (cpu.value, MemoryError(), torch.OutOfMemoryError()))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_prefixes_of_different_lengths_are_padded_on_the_left():
    short, long = (torch.randn(3, 2, 6, tokens, 8) for tokens in (2, 5))
    cache, mask = prefix_cache([short, long])
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]] and mask.dtype == torch.int64
    for layer in range(3):
        for kind, rows in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
            assert torch.equal(rows[0, :, 3:], short[layer, kind]) and not rows[0, :, :3].any()
            assert torch.equal(rows[1], long[layer, kind])
    own = DynamicCache()
    assert prefix_cache([short], own)[0] is own and own.get_seq_length() == 2
