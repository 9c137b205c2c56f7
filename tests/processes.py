"""The checks that each of four processes makes. test_distributed.py starts them with the folder of a saved Bloom.

Summed over the processes, gradients and losses equal those of one process with all rows: to 1e-6 if each process holds the
whole base, to 1e-5 if they share it. Every process gets all answers, in the order of the rows.
"""

import sys

import torch
from datasets import Dataset
from models import examples_of, loss_and_gradient, random_bloom
from transformers import AutoConfig, AutoTokenizer

from prefix_tuning import PrefixBloom, bundled, distributed
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import wrap_layers
from prefix_tuning.base_model.sharding import load_sharded
from prefix_tuning.data.templates import prompt_ids, talk_of
from prefix_tuning.evaluation import Turn, answer_turns, evaluate_rows
from prefix_tuning.generation.batches import complete
from prefix_tuning.model.batch import count_labels, pack
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.training.steps import Steps

CPU = torch.device("cpu")
folder = sys.argv[1]


def step_loss(model, batches, labels):
    """The loss of a step, or a rank's part of it, and its gradient, as functions of the prefix."""
    return lambda leaf: sum(model.label_losses(batch, leaf).sum() for batch in batches) / labels


with distributed.processes(CPU):
    plain = Bloom.from_pretrained(folder).requires_grad_(False).eval()
    models = [(plain, 1e-6)]
    for parts, checkpointing in ((4, False), (4, True), (2, True)):
        sharded = load_sharded(folder, AutoConfig.from_pretrained(folder), torch.float32, CPU, parts)
        wrap_layers(sharded, checkpointing, torch_compile=False)
        assert fingerprint(sharded, None) == fingerprint(plain, None)
        held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
        assert held < 1.05 * plain.num_parameters() / parts
        models.append((sharded, 1e-5))

    # Six rows for four processes: the answers must come back in the order of the rows.
    tokenizer = AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL))
    asked = [f"{number}加{number}等于多少？" for number in range(6)]
    model = PrefixBloom(random_bloom(initializer_range=0.3))
    ids, expected = prompt_ids(tokenizer, [talk_of(text) for text in asked]), tokenizer("一二三").input_ids
    answers = complete(model, tokenizer, ids, max_new_tokens=len(expected), do_sample=False)
    turns = [Turn([], prompt, expected) for prompt in ids]
    assert len(set(answers)) > 3 and answer_turns(model, tokenizer, turns, None, 1000) == answers
    # On a shared base, a process that has finished its answers still takes part in the passes of the others.
    turns = [Turn([], prompt, expected * (1 + number % 3)) for number, prompt in enumerate(ids)]
    found = [answer_turns(PrefixBloom(model, tokenizer), tokenizer, turns, None, 1000) for model, _ in models]
    assert all(found[0]) and found == [found[0]] * len(models)

    examples = examples_of([5, 60, 3, 21, 8, 33, 70, 2])
    shape = plain.config
    torch.manual_seed(0)
    prefix = torch.randn(shape.n_layer, 2, shape.n_head, 4, shape.hidden_size // shape.n_head)
    # Six rows for four processes: whoever has no pass left takes part in those of the others. All get all tokens.
    rows = Dataset.from_list([vars(example) for example in examples[:6]])
    for model, _ in models:
        loss, likeliest = evaluate_rows(model, rows, prefix, 40, lambda row, tokens: [row, tokens])
        losses = [plain.label_losses(batch, prefix) for batch in pack(examples[:6], 1000)]
        assert abs(loss - torch.cat(losses).mean().item()) < 1e-4
        alone = [plain.label_scores(*pack([example], 1000), prefix)[1].tolist() for example in examples[:6]]
        alone = [list(pair) for pair in enumerate(alone)]
        assert distributed.gather(likeliest) == [likeliest] * 4 and likeliest == alone
    # One process may need more passes for its rows than another, or none at all.
    for used in (examples, examples[:1]):
        rows = Dataset.from_list([vars(example) for example in used])
        expected_loss, expected = loss_and_gradient(step_loss(plain, pack(used, 1000), count_labels(used)), prefix)
        for model, tolerance in models:
            (step,) = Steps(rows, rows_per_step=len(used), total=1, max_tokens=40, equal_passes=model is not plain)
            assert step.labels == count_labels(used)
            loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(prefix)
            if step.batches:
                part, gradient = loss_and_gradient(step_loss(model, step.batches, step.labels), prefix)
                loss += part
            distributed.all_sum(loss)
            distributed.all_sum(gradient)
            assert abs(loss - expected_loss) <= tolerance * expected_loss, (loss, expected_loss)
            assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()
