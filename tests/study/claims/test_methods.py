"""Variants of a prefix, each against transformers' own forward."""

import pytest
import torch
from models import examples_of, random_bloom, step_of, training_state

from prefix_tuning.model.batch import pack
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.study.attention import attending
from prefix_tuning.study.claims.methods import METHODS, EmbeddingOnly, FixedKeys, attend_infix
from prefix_tuning.study.scoring import label_logits, label_rows
from prefix_tuning.training.loop import optimizer_step


@pytest.fixture(scope="module")
def model():
    return random_bloom()


EXAMPLES = examples_of([12, 7, 5])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_its_rows_and_leaves_the_base_alone(model, tokenizer, name):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    method = METHODS[name]
    encoder = method.make(model, tokenizer, 3)
    base = encoder.base if name == "full" else model
    state, losses = training_state(encoder, learning_rate=0.01), []
    with method.attention(base):
        for number in range(1, 9):
            losses.append(optimizer_step(base, state, step_of(EXAMPLES, number=number))[1].item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "attend_in" not in vars(model)


@torch.no_grad()
def test_embeddings_in_front_of_the_row_by_transformers_own_forward(model):
    torch.manual_seed(0)
    encoder = EmbeddingOnly(model, 3)
    batch = next(pack(EXAMPLES[:1], 100))
    inputs = torch.cat((encoder.embeddings, model.transformer.word_embeddings(batch.input_ids)))
    expected = model(inputs_embeds=inputs.unsqueeze(0)).logits[0, 3:]
    found = label_logits(model, batch, encoder.bake())
    torch.testing.assert_close(found, expected[batch.label_positions], atol=1e-4, rtol=1e-4)


def test_embeddings_get_the_gradient_of_embeddings_in_front(model):
    torch.manual_seed(0)
    encoder = EmbeddingOnly(model, 3)
    batch = next(pack(EXAMPLES[:1], 100))
    model.label_losses(batch, encoder()).sum().backward()
    front = encoder.embeddings.detach().clone().requires_grad_()
    inputs = torch.cat((front, model.transformer.word_embeddings(batch.input_ids)))
    logits = model(inputs_embeds=inputs.unsqueeze(0)).logits[0, 3:][batch.label_positions]
    torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
    torch.testing.assert_close(encoder.embeddings.grad, front.grad, atol=1e-4, rtol=1e-3)


def test_the_first_gradient_of_full_fine_tuning_is_that_of_transformers(model, tokenizer):
    """Loss as the mean over all labels of the step; the gradient before clipping, by hooks on the parameters."""
    encoder = METHODS["full"].make(model, tokenizer, 3)
    base = encoder.base
    found = {}
    for name, parameter in base.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.__setitem__(name, p.grad.clone()))
    optimizer_step(base, training_state(encoder), step_of(EXAMPLES, max_tokens=1000))
    twin = random_bloom().requires_grad_()
    losses = []
    for example in EXAMPLES:
        logits = twin(torch.tensor([example.input_ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="sum"))
    labels = sum(label != -100 for example in EXAMPLES for label in example.labels[1:])
    (sum(losses) / labels).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert encoder.bake().shape[3] == 0


def test_fixed_keys_stay_fixed_and_values_move(model):
    torch.manual_seed(0)
    config = PrefixConfig.of(model.config, 3)
    keys = torch.randn(3, 6, 3, 8)
    encoder = FixedKeys(config, keys.clone())
    values = encoder.bake()[:, 1]
    state = training_state(encoder)
    for number in range(1, 4):
        optimizer_step(model, state, step_of(EXAMPLES, number=number))
    assert torch.equal(encoder.bake()[:, 0], keys) and not torch.allclose(encoder.bake()[:, 1], values)


def test_separate_encoders_share_nothing(model, tokenizer):
    encoder = METHODS["separate"].make(model, tokenizer, 3)
    encoder()[:, 0].sum().backward()
    assert encoder.keys.embedding.weight.grad.abs().max() > 0
    assert not any(parameter.grad.any() for parameter in encoder.values.parameters())


@torch.no_grad()
def test_a_text_start_continues_that_text(model, tokenizer):
    """Both parametrisations begin with the pairs of the text's first tokens, so the base goes on as if it had read them."""
    batch = next(pack(EXAMPLES[:1], 100))
    text = tokenizer("请简短回答问题。", split_special_tokens=True).input_ids[:3]
    expected = model(torch.cat((torch.tensor(text), batch.input_ids))[None]).logits[0, 3:][batch.label_positions]
    for name in ("related", "direct from text"):
        encoder = METHODS[name].make(model, tokenizer, 3)
        torch.testing.assert_close(label_logits(model, batch, encoder.bake()), expected, atol=1e-4, rtol=1e-4)


def test_only_the_infix_changes_attention(model):
    for name, method in METHODS.items():
        with method.attention(model):
            assert ("attend_in" in vars(model)) == (name == "infix")
    with attending(model, lambda layer: None):
        assert "attend_in" in vars(model)


def infix_logits(model, example, pairs):
    """Twin: transformers' own forward, whose softmax is float32, reads the prompt without its last token. The pairs are
    appended to that cache. Then it reads the rest behind them.
    """
    first = next(index for index, label in enumerate(example.labels) if label != -100) - 1
    ids = torch.tensor([example.input_ids])
    cache = model(ids[:, :first], use_cache=True).past_key_values
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.unsqueeze(0), value.unsqueeze(0), layer)
    mask = torch.ones(1, pairs.shape[3] + ids.shape[1], dtype=torch.long)
    return model(ids[:, first:], past_key_values=cache, attention_mask=mask).logits[0, :-1]


@torch.no_grad()
def test_an_infix_is_a_cache_that_grew_between_prompt_and_answer(in_float64):
    model, examples, pairs, batch = in_float64
    with attending(model, lambda layer: attend_infix):
        found = label_logits(model, batch, pairs)
    rows = label_rows(batch)
    for row, example in enumerate(sorted(examples, key=lambda example: -len(example.input_ids))):
        torch.testing.assert_close(found[rows == row], infix_logits(model, example, pairs), atol=1e-6, rtol=0)
    assert not torch.allclose(found, label_logits(model, batch, pairs), atol=1e-3)
