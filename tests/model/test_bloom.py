import ast
import copy
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from launching import TRAIN
from models import examples_of, loss_and_gradient, plain_loss, prefix_config, random_bloom, relative
from rows import write_jsonl
from transformers import BloomForCausalLM, DynamicCache
from transformers.models.bloom import modeling_bloom
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.model import attention, bloom
from prefix_tuning.model.batch import IGNORED, Example, pack
from prefix_tuning.model.bloom import Bloom, FrozenHeadLoss, PackedBlock, add_packed_forward, prefix_cache
from prefix_tuning.model.encoder import PrefixEncoder

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


# Every field of the configuration that transformers' Bloom reads, with a value other than the default. With each of them the
# packed forward computes what transformers does. (With slow_but_exact and pretraining_tp > 1 together it would not, and
# load_base refuses that.)
FIELDS = {
    "apply_residual_connection_post_layernorm": True,
    "attention_dropout": 0.5,  # of training; the frozen base is in eval mode
    "hidden_dropout": 0.5,
    "hidden_size": 96,
    "layer_norm_epsilon": 0.5,
    "n_head": 4,
    "num_hidden_layers": 2,
    "output_attentions": True,  # these four decide what comes back beside the logits
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "pretraining_tp": 4,
    "slow_but_exact": True,
    "vocab_size": 5000,
}


def plain_float64_loss(model, examples, prefix):
    """The equations one by one, in float64. transformers' own forward is not exact enough: its softmax is float32."""
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


@pytest.fixture(params=["rows", "rows in pieces", "rows in bf16", "grid"])
def attention_form(request, monkeypatch):
    """Each form of attention: row by row, the same with the queries in chunks of 4, and as a padded grid. A base in bf16
    attends in bf16 in one of them, and in float32 in the others.
    """
    if request.param in ("rows in pieces", "rows in bf16"):
        monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    monkeypatch.setattr(attention, "attends_in_bf16", lambda head_dim: request.param == "rows in bf16")
    grid = request.param == "grid"
    monkeypatch.setattr(bloom, "attend", (lambda *x: attention.attend_padded(*x[:-1])) if grid else attention.attend_rows)


def packed_loss(model, examples, prefix):
    return sum(model.label_losses(batch, prefix).sum() for batch in pack(examples, 40))


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


def test_no_field_of_the_configuration_is_read_by_transformers_alone():
    used = {"BloomAttention", "BloomMLP", "BloomBlock", "BloomModel", "BloomForCausalLM"}
    classes = [node for node in ast.parse(inspect.getsource(modeling_bloom)).body if getattr(node, "name", "") in used]
    assert len(classes) == len(used)
    read = {
        node.attr
        for part in classes
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
    }
    assert {"slow_but_exact", "hidden_dropout", "return_dict"} <= read <= FIELDS.keys()


@pytest.mark.parametrize("field", FIELDS)
def test_the_packed_forward_heeds_the_configuration(field):
    model, examples = random_bloom(**{field: FIELDS[field]}), examples_of([7, 12, 9])
    assert getattr(model.config, field) == FIELDS[field] != getattr(random_bloom().config, field)
    prefix = PrefixEncoder(prefix_config(model)).bake()
    ours, our_gradient = loss_and_gradient(lambda x: packed_loss(model, examples, x), prefix)
    model.config.return_dict = True  # for the plain twin, which takes `.logits`
    theirs, their_gradient = loss_and_gradient(lambda x: plain_loss(model, examples, x), prefix)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert relative(our_gradient, their_gradient) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_float64_the_packed_forward_equals_the_equations(attention_form, options, monkeypatch):
    monkeypatch.setattr(bloom.FrozenHeadLoss, "LABELS_AT_ONCE", 7)
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
    ours = model.lm_head(model.packed_hidden(batch, prefix))
    assert relative(ours, logits[positions]) < 1e-5
    assert batch.labels.tolist() == [example.labels[i + 1] for i in positions]


def test_without_a_prefix_it_is_the_base(attention_form):
    model, examples = random_bloom(), examples_of([7, 12])
    loss = sum(model.label_losses(batch, None).sum() for batch in pack(examples, 100))
    assert loss.item() == pytest.approx(plain_loss(model, examples, None).item(), rel=1e-5)


def test_each_label_counts_by_its_weight():
    model, (batch,) = random_bloom(), pack(examples_of([7, 12]), 100)
    prefix, labels = PrefixEncoder(prefix_config(model)).bake(), range(len(batch.labels))
    _, whole = loss_and_gradient(lambda x: (model.label_losses(batch, x) * torch.arange(len(labels))).sum(), prefix)
    parts = [loss_and_gradient(lambda x, i=i: model.label_losses(batch, x)[i], prefix)[1] for i in labels]
    assert relative(sum(i * parts[i] for i in labels), whole) < 1e-5


def test_in_bfloat16_loss_and_gradient_stay_close_to_float64():
    """For every row length from 1 to 300, and every prefix length from 1 to 64 among them."""
    exact, low = (random_bloom(dtype=dtype, vocab_size=256, n_layer=2) for dtype in (torch.float64, torch.bfloat16))
    for length in range(1, 301):
        prefix = PrefixEncoder(prefix_config(exact, tokens=1 + 37 * length % 64)).bake()
        (batch,) = pack(examples_of([length], vocab_size=256, prompt_share=0.3), 1000)
        loss, gradient = loss_and_gradient(lambda x, batch=batch: exact.label_losses(batch, x).sum(), prefix.double())
        ours, our_gradient = loss_and_gradient(lambda x, batch=batch: low.label_losses(batch, x).sum(), prefix)
        assert ours == pytest.approx(loss, rel=2e-3)
        assert our_gradient.dtype == torch.float32
        assert (our_gradient - gradient).norm() <= 2e-2 * gradient.norm()


def test_in_bfloat16_every_form_of_attention_stays_close_to_float32(attention_form):
    model = random_bloom()
    examples, prefix = examples_of([7, 12, 30]), PrefixEncoder(prefix_config(model)).bake()
    low = copy.deepcopy(model).bfloat16()
    ours, our_gradient = loss_and_gradient(lambda x: packed_loss(low, examples, x), prefix)
    theirs, their_gradient = loss_and_gradient(lambda x: packed_loss(model, examples, x), prefix)
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert relative(our_gradient, their_gradient) < 2e-2


@pytest.mark.parametrize(
    "in_bf16, lengths, expected",
    [(False, [90, 80], torch.float32), (True, [90, 80], torch.bfloat16), (True, [7, 12], torch.float32)],
)
def test_in_bfloat16_on_a_cpu_attention_alone_is_float32(monkeypatch, in_bf16, lengths, expected):
    """The table at the head of model/bloom.py. Short rows form a grid, whose kernel is always in float32."""
    monkeypatch.setattr(attention, "attends_in_bf16", lambda head_dim: in_bf16)
    model, of_modules, of_attention = random_bloom(dtype=torch.bfloat16), set(), set()

    def attend(qkv, prefix, batch, bias, label_positions_only):
        context = attention.attend(qkv, prefix, batch, bias, label_positions_only)
        assert bias.dtype == torch.float32
        of_attention.add(context.dtype)
        return context

    model.attend_in = lambda layer: attend
    for block in model.transformer.h:
        for module in block.modules():
            module.register_forward_hook(lambda module, inputs, output: of_modules.add(output.dtype))
    (batch,) = pack(examples_of(lengths), 200)
    prefix = PrefixEncoder(prefix_config(model))()
    leaf = prefix.detach().requires_grad_()
    losses = model.label_losses(batch, leaf)
    losses.sum().backward()
    assert of_modules == {torch.bfloat16} and of_attention == {expected}
    assert prefix.dtype == losses.dtype == leaf.grad.dtype == torch.float32
    assert attention.attention_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_gradients_reach_no_parameter_of_the_base():
    model = random_bloom()
    leaf = PrefixEncoder(prefix_config(model)).bake().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batch in pack(examples_of([7, 12]), 100):
        model.label_losses(batch, leaf).sum().backward()
    assert leaf.grad.any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_row_without_labels_costs_nothing():
    (batch,) = pack([Example([5, 6, 7], [IGNORED] * 3)], 100)
    assert random_bloom().label_losses(batch, None).sum().item() == 0


def test_a_head_that_is_trained_is_refused_as_it_would_get_no_gradient():
    (batch,) = pack(examples_of([7, 12]), 100)
    with pytest.raises(ValueError, match="must be frozen"):
        random_bloom().requires_grad_().label_losses(batch, None)


def test_the_gradient_of_the_loss_is_its_derivative():
    """Numerically, in float64, for hidden states and labels that span several slices."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (9,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenHeadLoss, "LABELS_AT_ONCE", 4)
        assert torch.autograd.gradcheck(lambda x: FrozenHeadLoss.apply(x, weight, labels), (hidden,))


def test_in_fp16_a_confident_label_has_its_gradient():
    """50,000 tokens share a probability of 2e-3, each has 4e-8: fp16 rounds that to zero, and all of them together pull the
    hidden state as much as the label does. A loss scale keeps them.
    """
    torch.manual_seed(0)
    labels, scale = torch.arange(4), 2.0**16
    weight = torch.cat((torch.zeros(4), torch.randn(60))) + 0.01 * torch.randn(50_000, 64)
    weight[labels] = 4 * torch.eye(64)[:4]
    hidden = weight[labels] * (math.log(50_000 / 2e-3) / 16)
    gradients = []
    for dtype in (torch.float64, torch.float16):
        leaf = hidden.half().to(dtype).requires_grad_()
        (FrozenHeadLoss.apply(leaf, weight.half().to(dtype), labels) * scale / 100).sum().backward()
        gradients.append(leaf.grad.double())
    exact, ours = gradients
    # A logit of 16 to 32 is rounded to a 64th, and a CPU may add up 50,000 products in fp16.
    assert relative(ours, exact) < 0.1


def test_a_loaded_bloom_can_be_given_the_packed_forward(tmp_path):
    model = random_bloom()
    model.save_pretrained(tmp_path)
    loaded, report = Bloom.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    theirs = BloomForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = theirs(ids).logits
    assert torch.equal(loaded(ids).logits, before)
    add_packed_forward(theirs)
    assert all(type(block) is PackedBlock for block in theirs.transformer.h)
    assert torch.equal(theirs(ids).logits, before)


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


def test_labels_in_several_segments_of_a_row_cost_what_they_cost_transformers(attention_form, tmp_path, tokenizer):
    """Talks: every answer counts, no question does. The equations in float64, transformers' own forward in float32."""
    said = [f"法国的首都是哪里{'？' * number}" if number % 2 == 0 else f"巴黎{'。' * number}" for number in range(6)]
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    rows = [{"messages": messages[:turns]} for turns in (4, 2, 6, 6)]
    talks = tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 80)
    examples = take(talks, range(4))
    for example in examples:
        kinds = "".join("p" if label == IGNORED else "a" for label in example.labels)
        assert len(re.findall("p+a+", kinds)) == example.input_ids.count(tokenizer.eos_token_id) > 0
    assert len(examples[2].input_ids) > len(examples[0].input_ids) > len(examples[1].input_ids)
    for dtype, plain, most in ((torch.float64, plain_float64_loss, 1e-12), (torch.float32, plain_loss, 1e-5)):
        model = random_bloom(dtype=dtype)
        prefix = PrefixEncoder(prefix_config(model)).bake().to(dtype)
        ours, our_gradient = loss_and_gradient(lambda x, m=model: packed_loss(m, examples, x), prefix)
        theirs, their_gradient = loss_and_gradient(lambda x, m=model, p=plain: p(m, examples, x), prefix)
        assert ours == pytest.approx(theirs, rel=most)
        assert relative(our_gradient, their_gradient) < most
