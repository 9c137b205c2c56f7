"""Small random Blooms and prefixes, and what trains them."""

import copy
from typing import NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BloomConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefix_tuning import plain
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.rows import tokenize
from prefix_tuning.data.splits import load_splits
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.model.batch import IGNORED, Example, count_labels, pack
from prefix_tuning.model.bloom import Bloom, empty_prefix
from prefix_tuning.model.decoder import Decoder, as_packed
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training import run
from prefix_tuning.training.start import new_encoder
from prefix_tuning.training.state import Progress, TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Step, Steps


def random_bloom(seed=0, dtype=torch.float32, **options) -> Bloom:
    """A small Bloom whose biases and layer norms are random too, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 4096, "hidden_size": 48, "n_layer": 3, "n_head": 6, "pad_token_id": 3} | options
    model = Bloom(BloomConfig(**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


# Uneven heads, and a head_dim that is not hidden_size / heads where a family allows it. Each family takes what it knows.
_DECODER_SHAPE = {
    "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1,
    "max_position_embeddings": 128, "rotary_dim": 4, "ffn_dim": 40, "word_embed_proj_dim": 48, "n_inner": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def random_decoder(family, dtype=torch.float32, **options) -> Decoder:
    """A small model of a family other than Bloom, random in all its weights."""
    torch.manual_seed(0)
    default = CONFIG_MAPPING[family]()
    shape = {name: value for name, value in _DECODER_SHAPE.items() if hasattr(default, name)} | options
    if "sliding_attention" in (getattr(default, "layer_types", None) or ()):
        shape["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return as_packed(model.to(dtype))


def save_decoder(folder, tokenizer, family, **options) -> str:
    """A folder with `random_decoder` for a tokenizer, and that tokenizer."""
    options |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    random_decoder(family, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def eager_twin(base) -> PreTrainedModel:
    """A copy whose own forward can return attention weights."""
    twin = copy.deepcopy(base)
    twin.set_attn_implementation("eager")
    return twin


def prefix_config(model, tokens=5, projection=True, width=None) -> PrefixConfig:
    return PrefixConfig.of(model.config, tokens, width, projection)


def examples_of(lengths, vocab_size=4096, seed=0, prompt_share=0.5) -> list[Example]:
    """Rows of random tokens with these lengths, the first part of each without labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(4, vocab_size, (length,), generator=generator).tolist()
        cut = max(1, int(length * prompt_share))
        examples.append(Example(ids, [IGNORED] * cut + ids[cut:]))
    return examples


def plain_loss(model, examples, prefix):
    """plain.py's loss, by transformers' own forward with the prefix as past_key_values: nats, summed over all rows."""
    prefix = empty_prefix(model.config) if prefix is None else prefix
    rows = [(torch.tensor([example.input_ids]), torch.tensor([example.labels])) for example in examples]
    return sum(plain.loss_of(model, prefix, *row) for row in rows)


def loss_and_gradient(loss_of, prefix):
    """loss_of(prefix), and its gradient in the prefix."""
    leaf = prefix.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.item(), leaf.grad


def training_state(encoder, learning_rate=0.1, loss_scaling=False, max_grad_norm=1.0) -> TrainingState:
    """A new state, with weight decay, warm-up and a rate that falls over 10 steps."""
    schedule = make_schedule("linear", warmup_steps=2, total_steps=10)
    state = TrainingState(encoder, make_optimizer(encoder, 0.5), schedule, max_grad_norm, loss_scaling)
    state.progress.peak_learning_rate = learning_rate
    return state


def step_of(examples, max_tokens=1000, number=1) -> Step:
    """These examples as one optimizer step of a single process."""
    tokens = sum(len(example.input_ids) for example in examples)
    return Step(number, list(pack(examples, max_tokens)), count_labels(examples), tokens, 0, len(examples))


def flat(weights):
    """All numbers of a state_dict in one axis."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(weights.items())])


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def deviation(ours, theirs):
    """The mean absolute difference, relative to the mean absolute value.

    It is made for Adam's updates. Where a gradient is nothing but rounding error, its update may go the other way; in a mean
    that is one number among thousands.
    """
    return ((ours - theirs).abs().mean() / theirs.abs().mean()).item()


# A learning rate too small to change any figure. Every step then begins with equal weights, so runs that round differently
# can be compared. With a real rate Adam amplifies rounding errors, and differently on each CPU.
STANDSTILL = 1e-12


def random_prefix(model, tokens=5, seed=1):
    torch.manual_seed(seed)
    return 10 * PrefixEncoder(prefix_config(model, tokens)).bake()  # large enough to change the text


def peft_model(model, encoder):
    """PEFT around `model`, with our encoder's weights."""
    # Imported here because the processes that tests start import this module too, and do not need PEFT.
    from peft import PrefixTuningConfig, get_peft_model

    config = encoder.config
    wrapped = get_peft_model(
        model,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prefix_projection=config.prefix_projection,
            encoder_hidden_size=config.encoder_hidden_size,
        ),
    )
    wrapped.prompt_encoder["default"].load_state_dict(encoder.state_dict())
    return wrapped


def initial_encoder(config, tokenizer):
    model = random_bloom()
    torch.manual_seed(config.seed)
    return new_encoder(run.prefix_config_of(config, model), model, tokenizer, config.prefix_init, config.init_text)


class Beginning(NamedTuple):
    """All that a new run of train.py has before its first step. eval_set: None without --eval_dataset."""

    base: Bloom
    tokenizer: PreTrainedTokenizerBase
    eval_set: Dataset | None
    state: TrainingState
    steps: Steps


def beginning(config, dtype=torch.float32, shuffled_epochs=None) -> Beginning:
    """Makes the same calls as train.py. shuffled_epochs: repeats the rows this many times, each time in another order."""
    base, tokenizer = load_base(config.model_name_or_path, dtype, torch.device("cpu"))
    splits = load_splits(config.dataset, config.eval_dataset, 0, None, config.seed)
    train_set, eval_set = (rows and tokenize(rows, tokenizer, config.max_length) for rows in splits)
    if shuffled_epochs:
        train_set = concatenate_datasets([train_set.shuffle(seed=epoch) for epoch in range(shuffled_epochs)])
    torch.manual_seed(config.seed)
    encoder = new_encoder(run.prefix_config_of(config, base), base, tokenizer, config.prefix_init, config.init_text)
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    total = run.count_steps(config, len(train_set), rows_per_step, Progress())
    max_tokens = config.max_tokens_per_batch or suggested_max_tokens(base, gathers=False)
    steps = Steps(train_set, rows_per_step, total, max_tokens, seed=config.seed if config.shuffle else None)
    schedule = make_schedule(config.lr_scheduler_type, config.warmup_steps, total)
    state = TrainingState(encoder, make_optimizer(encoder, config.weight_decay), schedule, config.max_grad_norm, False)
    state.progress.peak_learning_rate = config.learning_rate
    state.progress.rows_per_step = rows_per_step
    return Beginning(base, tokenizer, eval_set, state, steps)
