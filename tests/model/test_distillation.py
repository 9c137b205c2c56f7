"""KL(teacher || student), in slices, against autograd over whole logits; and of one base after two kinds of pairs."""

import pytest
import torch
from models import examples_of, loss_and_gradient, random_bloom, random_decoder, relative

from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import EMPTY_BATCH, pack
from prefix_tuning.model.bloom import FrozenHeadLoss, head_logits, prefix_cache
from prefix_tuning.model.distillation import Distillation, FrozenHeadDivergence
from prefix_tuning.model.encoder import key_value_shape

EXAMPLES = examples_of([5, 9, 31, 50, 60], vocab_size=99)


def random_pairs(model, tokens, seed):
    layers, heads, head_dim = key_value_shape(model.config)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, 2, heads, tokens, head_dim, generator=generator, dtype=torch.float64).to(model.dtype)


@pytest.mark.parametrize("bias, cap", [(False, None), (True, None), (True, 3.0)])
def test_divergence_and_its_gradient_are_those_of_autograd(monkeypatch, bias, cap):
    """13 labels in slices of 5."""
    monkeypatch.setattr(FrozenHeadLoss, "LABELS_AT_ONCE", 5)
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (40, 8), "teacher": (13, 8), "hidden": (13, 8), "bias": (40,), "weights": (13,)}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    head = drawn["weight"], drawn["bias"] if bias else None, cap

    def whole(hidden):
        ours, theirs = (head_logits(x, *head).log_softmax(-1) for x in (hidden, drawn["teacher"]))
        found = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return (found * drawn["weights"]).sum()

    def in_slices(hidden):
        found = FrozenHeadDivergence.apply(hidden, head[0], drawn["teacher"], *head[1:])
        return (found * drawn["weights"]).sum()

    (loss, gradient), (expected_loss, expected) = (loss_and_gradient(f, drawn["hidden"]) for f in (in_slices, whole))
    assert loss == pytest.approx(expected_loss, rel=1e-12) and relative(gradient, expected) < 1e-12
    with pytest.raises(ValueError, match="must be frozen"):
        FrozenHeadDivergence.apply(drawn["hidden"], head[0], drawn["teacher"].requires_grad_(), *head[1:])


def bases():
    """Bloom; a soft cap, a multiplied and a divided head, and a head with a bias."""
    yield "bloom", lambda: random_bloom(dtype=torch.float64, vocab_size=99)
    for family in ("gemma2", "cohere", "granite", "phi"):
        yield family, lambda family=family: random_decoder(family, torch.float64)


@pytest.mark.parametrize("base", [pytest.param(base, id=name) for name, base in bases()])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_teacher_and_student_are_transformers_own_forward_after_their_pairs(base, alpha):
    model = base()
    teacher, prefix = random_pairs(model, 11, seed=1), random_pairs(model, 4, seed=2)

    def logits_after(pairs, ids):
        return model(ids, **{CACHE: prefix_cache([pairs])[0]}).logits[0, :-1].log_softmax(-1)

    def plainly(leaf):
        loss = torch.zeros((), dtype=torch.float64)
        for example in EXAMPLES:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)[1:]
            at = labels != -100
            theirs, ours = (logits_after(pairs, ids)[at] for pairs in (teacher, leaf))
            loss += (1 - alpha) * torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
            loss += alpha * torch.nn.functional.nll_loss(ours, labels[at], reduction="sum")
        return loss

    objective = Distillation(model, teacher, alpha)
    loss, gradient = loss_and_gradient(
        lambda leaf: sum(objective.label_losses(batch, leaf).sum() for batch in pack(EXAMPLES, 60)), prefix
    )
    expected_loss, expected = loss_and_gradient(plainly, prefix)
    # transformers computes softmax, norms or rotation of most families in float32.
    assert loss == pytest.approx(expected_loss, rel=1e-5) and relative(gradient, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_own_pairs_leave_nothing_to_learn(dtype):
    """Exactly 0, also with filler labels in bf16; and at least 0 for any other prefix."""
    model = random_bloom(dtype=dtype)
    teacher = random_pairs(model, 6, seed=1).float()
    objective = Distillation(model, teacher)
    (batch,) = pack(examples_of([7, 12, 30]), 100)
    losses = objective.label_losses(batch, teacher)
    assert losses.shape == batch.labels.shape and losses.dtype == torch.float32 and not losses.any()
    other, gradient = loss_and_gradient(lambda leaf: objective.label_losses(batch, leaf).sum(), 3 * teacher)
    assert other > 0 and gradient.isfinite().all() and gradient.any()
    assert (objective.label_losses(batch, None) > 0).all()
    scores, likeliest = objective.label_scores(batch, 3 * teacher)
    assert torch.equal(scores, objective.label_losses(batch, 3 * teacher))
    assert torch.equal(likeliest, model.label_scores(batch, 3 * teacher)[1])
    assert objective.label_losses(EMPTY_BATCH, teacher).shape == (0,)


def test_in_bf16_the_divergence_is_near_that_of_float32():
    """bf16 keeps 8 bits, and a number passes about 10 roundings on its way through 3 layers and back."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = random_bloom(dtype=dtype)
        objective = Distillation(model.to(dtype), 3 * random_pairs(random_bloom(), 6, seed=1))
        (batch,) = pack(examples_of([7, 12, 30]), 100)
        prefix = 3 * random_pairs(random_bloom(), 4, seed=2)
        found.append(loss_and_gradient(lambda leaf, o=objective, b=batch: o.label_losses(b, leaf).sum(), prefix))
    (loss, gradient), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=10 * 2**-8) and relative(gradient, expected) < 10 * 2**-8
