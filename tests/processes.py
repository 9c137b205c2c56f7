"""What each of four processes checks; test_distributed.py starts them, with the folder of a saved Bloom.

Their gradients and losses, summed, are those of one process with all rows: with a base that each has whole to 1e-6, with one
that they share to 1e-5.
"""

import sys

import torch
from helpers import examples_of
from transformers import AutoConfig, BloomForCausalLM

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.sharding import load_sharded
from prefix_tuning.model.batch import count_labels
from prefix_tuning.model.bloom import block_runner
from prefix_tuning.training.loop import accumulate_gradients

CPU = torch.device("cpu")
scaler = torch.amp.GradScaler("cpu", enabled=False)
folder = sys.argv[1]

with distributed.processes(CPU):
    plain = BloomForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    models = [(plain, 1e-6)]
    for parts in (4, 2):
        sharded = load_sharded(folder, AutoConfig.from_pretrained(folder), torch.float32, CPU, parts)
        assert fingerprint(sharded, None) == fingerprint(plain, None)
        held = sum(parameter.to_local().numel() for parameter in sharded.parameters())
        assert held < 1.05 * plain.num_parameters() / parts
        models.append((sharded, 1e-5))

    examples = examples_of([5, 60, 3, 21, 8, 33, 70, 2])
    shape = plain.config
    torch.manual_seed(0)
    prefix = torch.randn(shape.n_layer, 2, shape.n_head, 4, shape.hidden_size // shape.n_head)
    # Rows of one process may make more passes than those of another, or none at all.
    for model, tolerance in models:
        for used, checkpointing in ((examples, False), (examples, True), (examples[:1], False)):
            labels = count_labels(used)
            expected = prefix.clone().requires_grad_()
            expected_loss = accumulate_gradients(plain, expected, used, labels, scaler, max_tokens=1000)
            leaf, run = prefix.clone().requires_grad_(), block_runner(checkpointing)
            part = accumulate_gradients(model, leaf, distributed.share(used), labels, scaler, 40, run)
            summed, grad = distributed.all_sum(part.double()), distributed.all_sum(leaf.grad)
            assert abs(summed - expected_loss) <= tolerance * expected_loss, (summed, expected_loss)
            assert (grad - expected.grad).abs().max() <= tolerance * expected.grad.abs().max()
