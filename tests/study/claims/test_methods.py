"""Variants of a prefix, each against what it stands for, by transformers' own forward."""

import pytest
import torch
from helpers import examples_of, random_bloom, step_of, training_state

from prefix_tuning.model.batch import pack
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.study.attention import attending
from prefix_tuning.study.claims.methods import METHODS, EmbeddingOnly, FixedKeys
from prefix_tuning.study.scoring import label_logits
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
    base, encoder = method.make(model, tokenizer, 3)
    state, losses = training_state(encoder, learning_rate=0.01), []
    with method.attention(base):
        for number in range(1, 9):
            losses.append(optimizer_step(base, state, step_of(EXAMPLES, number=number))[1].item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any("attend" in vars(block) for block in model.transformer.h)


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
    base, encoder = METHODS["full"].make(model, tokenizer, 3)
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
    _, encoder = METHODS["separate"].make(model, tokenizer, 3)
    encoder()[:, 0].sum().backward()
    assert encoder.keys.embedding.weight.grad.abs().max() > 0
    assert not any(parameter.grad.any() for parameter in encoder.values.parameters())


@torch.no_grad()
def test_a_text_start_continues_that_text(model, tokenizer):
    """Both parametrisations begin with the pairs of the text's first tokens: the base as if it had read them."""
    batch = next(pack(EXAMPLES[:1], 100))
    text = tokenizer("请简短回答问题。", split_special_tokens=True).input_ids[:3]
    expected = model(torch.cat((torch.tensor(text), batch.input_ids))[None]).logits[0, 3:][batch.label_positions]
    for name in ("related", "direct from text"):
        encoder = METHODS[name].make(model, tokenizer, 3)[1]
        torch.testing.assert_close(label_logits(model, batch, encoder.bake()), expected, atol=1e-4, rtol=1e-4)


def test_only_the_infix_changes_attention(model):
    for name, method in METHODS.items():
        with method.attention(model):
            assert any("attend" in vars(block) for block in model.transformer.h) == (name == "infix")
    with attending(model, lambda layer: None):
        assert all("attend" in vars(block) for block in model.transformer.h)
