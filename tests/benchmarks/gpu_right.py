"""Parts of gpu.py: does a GPU compute the right numbers, and does a run on it survive a kill and a lack of memory?"""

import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import answers
import models
import torch
import torch.nn.functional as F
from gpu_job import Checks, Job
from runs import LATEST, assert_same_run, metrics_of
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prefix_tuning import PrefixBloom, bundled
from prefix_tuning.base_model.loading import load_base, wrap_layers
from prefix_tuning.cli import parse_train_config, train_command
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.devices import PRECISIONS, reproducible
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import IGNORED, pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.checkpoints import find_checkpoints
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # relative, of losses and gradients


def right(job: Job) -> Checks:
    """Our numbers against those of transformers and PEFT, and flags that must not change them."""
    base, tokenizer = load_base(bundled.MODEL, torch.float32, torch.device(job.device))
    examples = take(tokenize(load_rows("bundled:short", ("train",)), tokenizer, 256), range(6 if job.toy else 64))
    for name in job.precisions:
        yield f"loss and gradient against transformers, {name}", partial(against, transformers_loss, job, examples, name)
        yield f"loss and gradient against PEFT, {name}", partial(against, peft_loss, job, examples, name)
    yield "fp16 overflow: the step is skipped", partial(overflow, job, examples)
    yield "--gradient_checkpointing against none", partial(against_flag, job, examples, gradient_checkpointing=True)
    if job.on_cuda:
        yield "--torch_compile against none", partial(against_flag, job, examples, torch_compile=True)
    yield "static cache answers as the dynamic one", partial(static_cache, base, tokenizer, 4 if job.toy else 32)


def new_encoder(base) -> PrefixEncoder:
    torch.manual_seed(0)
    return PrefixEncoder(models.prefix_config(base, tokens=16)).to(base.device)


# Each of these returns the encoder that gets the gradient, and the loss of the examples in nats.


def packed_loss(base, encoder, examples):
    prefix = encoder()
    return encoder, sum(base.label_losses(batch.to(base.device), prefix).sum() for batch in pack(examples, 640))


def as_tensors(base, example):
    return (torch.tensor([numbers], device=base.device) for numbers in (example.input_ids, example.labels))


def transformers_loss(base, encoder, examples):
    prefix = encoder()
    loss = torch.zeros((), device=base.device)
    for ids, labels in (as_tensors(base, example) for example in examples):
        logits = base(ids, **{CACHE: prefix_cache([prefix.to(base.dtype)])[0]}).logits[0, :-1].float()
        loss = loss + F.cross_entropy(logits, labels[0, 1:], reduction="sum")
    return encoder, loss


def peft_loss(base, encoder, examples):
    """PEFT's encoder starts with the weights of ours. Its loss is a mean over labels, which it counts row by row."""
    wrapped, loss = models.peft_model(base, encoder).to(base.device), 0.0
    for example in examples:
        ids, labels = as_tensors(base, example)
        mean = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss = loss + mean * (labels[:, 1:] != IGNORED).sum()
    return wrapped.prompt_encoder["default"], loss


def loss_and_gradient(loss_of, base, encoder, examples):
    """The loss, and its gradient in all weights of the encoder: the prefix's gradient, taken one step further back."""
    encoder.zero_grad()
    trained, loss = loss_of(base, encoder, examples)
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten().float() for parameter in trained.parameters()])


def within(tolerance: float, ours, theirs) -> dict:
    """The relative differences of two losses and gradients. Raises AssertionError if one is above the tolerance."""
    (loss, gradient), (their_loss, their_gradient) = ours, theirs
    result = {"loss differs by": abs(loss - their_loss) / abs(their_loss)}
    result["gradient by"] = models.relative(gradient, their_gradient)
    assert max(result.values()) <= tolerance, f"above {tolerance}: {result}"
    return {**result, "tolerance": tolerance}


def against(loss_of, job: Job, examples, precision: str) -> dict:
    base, _ = load_base(bundled.MODEL, PRECISIONS[precision], torch.device(job.device))
    encoder = new_encoder(base)
    ours = loss_and_gradient(packed_loss, base, encoder, examples)
    return within(TOLERANCES[precision], ours, loss_and_gradient(loss_of, base, encoder, examples))


def against_flag(job: Job, examples, **flags) -> dict:
    device = torch.device(job.device)
    bases = [load_base(bundled.MODEL, torch.float32, device, **options)[0] for options in ({}, flags)]
    without, with_flag = (loss_and_gradient(packed_loss, base, new_encoder(base), examples) for base in bases)
    return within(TOLERANCES["fp32"], with_flag, without)


def overflow(job: Job, examples) -> dict:
    """One step with a loss scale that overflows, one with a scale that does not. On a CPU the base is fp32."""
    dtype, scale = (torch.float16, 2.0**40) if job.on_cuda else (torch.float32, 2.0**127)
    base, _ = load_base(bundled.MODEL, dtype, torch.device(job.device))
    state = models.training_state(new_encoder(base), loss_scaling=True)
    state.scaler = torch.amp.GradScaler(torch.device(job.device).type, init_scale=scale)
    step, before = models.step_of(examples), state.encoder.bake()
    optimizer_step(base, state, step)
    assert torch.equal(state.encoder.bake(), before), "the weights have changed"
    assert state.scaler.get_scale() == scale / 2 and state.progress.updates == 0
    state.scaler.update(1024.0)
    for _ in range(2):  # the first update of the warm-up has rate 0
        optimizer_step(base, state, step)
    assert state.progress.updates == 2 and not torch.equal(state.encoder.bake(), before)
    return {"scale": "halved", "schedule": "stood still", "next step": "done"}


def static_cache(base, tokenizer, tokens: int) -> dict:
    model = PrefixBloom(base, tokenizer)
    model.attach("random", models.random_prefix(base))
    inputs = tokenizer(answers.PROMPTS, return_tensors="pt", padding=True).to(base.device)
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    dynamic, static = (model.generate(**inputs, **length, **kind) for kind in ({}, {"cache_implementation": "static"}))
    assert torch.equal(dynamic, static), f"{(dynamic != static).sum()} of {dynamic.numel()} tokens differ"
    return {"equal tokens": tokens * len(dynamic)}


def decoders(job: Job) -> Checks:
    """Families other than Bloom: grouped heads, norms of queries and keys, soft caps with windows, sinks with experts."""
    # It raises where torch has no deterministic kernel.
    with reproducible(torch.device(job.device)):
        for family in ("llama", "qwen3", "gemma2", "gpt_oss"):
            for name in job.precisions:
                yield (
                    f"{family}: loss and gradient against transformers, {name}",
                    partial(decoder_against, job, family, name),
                )
            yield f"{family}: --gradient_checkpointing against none", partial(decoder_checkpointing, job, family)
            yield f"{family}: same bits again, bf16", partial(decoder_repeats, job, family)
            yield f"{family}: static cache, and rows with different prefixes", partial(decoder_answers, job, family)
        for family in ("granitemoe", "mixtral", "olmoe", "qwen3_moe"):  # experts
            yield f"{family}: same bits again, bf16", partial(decoder_repeats, job, family)


def decoder(job: Job, family: str, precision: str = "fp32"):
    return models.random_decoder(family, PRECISIONS[precision]).to(job.device)


def decoder_against(job: Job, family: str, precision: str) -> dict:
    base, examples = decoder(job, family, precision), models.examples_of([5, 9, 31, 50, 60], vocab_size=99)
    encoder = new_encoder(base)
    ours = loss_and_gradient(packed_loss, base, encoder, examples)
    # Where two experts are almost equally likely, rounding decides which one a token goes to.
    has_experts = hasattr(base.config, "num_experts_per_tok")
    tolerance = 2 * TOLERANCES["bf16"] if has_experts and precision != "fp32" else TOLERANCES[precision]
    return within(tolerance, ours, loss_and_gradient(transformers_loss, base, encoder, examples))


def decoder_repeats(job: Job, family: str) -> dict:
    """The same gradient twice, in bf16."""
    base, examples = decoder(job, family, "bf16"), models.examples_of([5, 9, 31, 50, 60, 200], vocab_size=99)
    gradients = [loss_and_gradient(packed_loss, base, new_encoder(base), examples)[1] for _ in range(3)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients), "the bits differ"
    return {"equal numbers": len(gradients[0])}


def decoder_checkpointing(job: Job, family: str) -> dict:
    base, examples = decoder(job, family), models.examples_of([5, 9, 31, 50, 60], vocab_size=99)
    encoder = new_encoder(base)
    without = loss_and_gradient(packed_loss, base, encoder, examples)
    wrap_layers(base, gradient_checkpointing=True, torch_compile=False)
    return within(TOLERANCES["fp32"], loss_and_gradient(packed_loss, base, encoder, examples), without)


def decoder_answers(job: Job, family: str) -> dict:
    """Every answer of a batch, with both kinds of cache, is the one that its row gets alone."""
    config = models.random_decoder(family).config
    window = {"sliding_window": 64} if hasattr(config, "sliding_window") else {}
    model = PrefixBloom(models.random_decoder(family, **window).to(job.device))
    model.generation_config.eos_token_id = None
    for name, tokens in (("five", 5), ("nine", 9)):
        model.attach(name, models.random_prefix(model, tokens))
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [20, 21, 22, 23, 24, 25, 26]], device=job.device)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    names = ["five", "nine"]
    dynamic = model.generate(**inputs, prefix_name=names, **length)
    static = model.generate(**inputs, prefix_name=names, cache_implementation="static", disable_compile=True, **length)
    assert torch.equal(dynamic, static), f"{(dynamic != static).sum()} tokens of the static cache differ"
    for row, name in enumerate(names):
        alone = model.generate(ids[row : row + 1, ids[row] != 0], prefix_name=name, **length)
        assert torch.equal(alone[0, -8:], dynamic[row, -8:]), f"row {row} differs from its answer alone"
    return {"equal tokens": 16}


def runs(job: Job) -> Checks:
    """Whole trainings, each in a process: the demo, one that is killed, those of torchrun, one without memory."""
    with tempfile.TemporaryDirectory() as folder:
        unbroken = equal_settings(job, f"{folder}/unbroken")
        yield "an unbroken run", partial(in_process, job, unbroken)
        yield "a run that is killed and resumed", partial(killed_and_resumed, job, unbroken)
        backend = "nccl" if job.on_cuda else "gloo"
        yield f"one process of torchrun ({backend})", partial(under_torchrun, job, unbroken)
        yield f"one process of torchrun ({backend}), --shard_base", partial(under_torchrun, job, unbroken, shard_base=True)
        if job.on_cuda:
            yield "out of memory is one line and exit code 2", partial(out_of_memory, job, f"{folder}/large")
    for name in job.precisions:
        yield f"the demo to its end, {name}", partial(demo, job, name)


def run(settings: dict) -> None:
    """The work of a process: one training, without its curves, as drawing them would take as long as the training."""
    sys.modules["matplotlib.figure"] = None
    train(TrainConfig(**settings))


def in_process(job: Job, settings: dict) -> dict:
    process = job.processes.Process(target=run, args=(settings,))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}; see gpu.log"
    summary = metrics_of(settings["output_dir"])[-1]
    return {"steps": summary["steps"], "seconds": summary["train_seconds"]}


def equal_settings(job: Job, folder: str) -> dict:
    """The settings of runs that must end with the same prefix."""
    steps = {"max_steps": 6, "save_steps": 1} if job.toy else {"max_steps": 100, "save_steps": 10}
    rows = {"dataset": "bundled:short", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return {"output_dir": folder, "device": job.device, "learning_rate": 5e-3, "logging_steps": 1} | steps | rows


def demo(job: Job, precision: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output_dir", f"{folder}/demo", "--device", job.device, "--precision", precision]
        flags += ["--eval_steps", "1000000"]  # at the start and at the end only
        if job.toy:
            rows = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines(True)[:4]
            Path(folder, "few.jsonl").write_text("".join(rows), "utf-8")
            flags += ["--max_steps", "2", "--eval_dataset", f"{folder}/few.jsonl"]
        result = in_process(job, vars(parse_train_config(flags)))
        evaluated = [line for line in metrics_of(f"{folder}/demo") if "eval_loss" in line][-1]
        return result | {"exact match": evaluated["eval_exact_match"], "eval loss": evaluated["eval_loss"]}


def killed_and_resumed(job: Job, unbroken: dict) -> dict:
    settings = unbroken | {"output_dir": unbroken["output_dir"] + "-killed"}
    process, folder = job.processes.Process(target=run, args=(settings,)), Path(settings["output_dir"])
    process.start()
    while process.is_alive() and not (found := find_checkpoints(folder)):
        process.join(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had ended before it was killed"
    in_process(job, settings | LATEST)
    assert_same_run(folder, unbroken["output_dir"])
    return {"killed after": found[0].stem, "same bits": "yes"}


def under_torchrun(job: Job, unbroken: dict, **flags) -> dict:
    """A run under `torchrun --nproc_per_node 1`, against the same run without torchrun."""
    settings = unbroken | {"output_dir": unbroken["output_dir"] + "-torchrun"} | flags
    shutil.rmtree(settings["output_dir"], ignore_errors=True)
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "gpu", "max_restarts": 0}
    method = job.processes.get_start_method()
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, start_method=method, **rendezvous)
    elastic_launch(config, run)(settings)
    ours, alone = (load_prefix(folder)[0] for folder in (settings["output_dir"], unbroken["output_dir"]))
    difference = models.relative(ours, alone)
    assert difference <= 1e-2, f"the prefix differs by {difference}"
    return {"prefix differs by": difference, "seconds": metrics_of(settings["output_dir"])[-1]["train_seconds"]}


def out_of_memory(job: Job, folder: str) -> dict:
    """train.py with all rows of the demo in one pass, where it may allocate 512 MiB."""
    flags = f"--device {job.device} --precision fp32 --output_dir {folder} --eval_fraction 0"
    flags += " --per_device_train_batch_size 3000 --max_tokens_per_batch 1000000"
    with tempfile.NamedTemporaryFile() as errors:
        process = job.processes.Process(target=train_with_512_mib, args=(flags.split(), errors.name))
        process.start()
        process.join()
        text = Path(errors.name).read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert process.exitcode == 2 and len(lines) == 1, f"exit code {process.exitcode}: {text[-200:]}"
    assert "ran out of memory; lower --max_tokens_per_batch" in lines[0], lines[0]
    return {"says": lines[0]}


def train_with_512_mib(flags: list[str], errors: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    torch.cuda.set_per_process_memory_fraction(2**29 / torch.cuda.get_device_properties(0).total_memory)
    sys.argv = ["train.py", *flags]
    train_command()
