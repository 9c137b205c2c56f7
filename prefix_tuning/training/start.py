"""Where the encoder starts."""

import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning.base_model.identity import check_base
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.settings import TrainConfig


def prefix_config_of(config: TrainConfig, model: BloomForCausalLM) -> PrefixConfig:
    """The shape of a new prefix for this base."""
    shape = model.config
    return PrefixConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        token_dim=shape.hidden_size,
        encoder_hidden_size=config.encoder_hidden_size or shape.hidden_size,
        prefix_projection=config.prefix_projection,
    )


def make_encoder(
    config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, base: dict
) -> PrefixEncoder:
    """The encoder at its starting point: an earlier run's, or a new one for this base. On the CPU, float32.

    base: the `fingerprint` of the model, which an earlier run's must match.
    """
    if config.prefix_from:
        encoder, noted = load_encoder(config.prefix_from)
        check_base(encoder.bake().shape, noted, base, config.prefix_from, config.force)
        return encoder
    encoder = PrefixEncoder(prefix_config_of(config, model))
    text = None
    if config.prefix_init == "text":
        text = text_prefix(model, tokenizer, config.init_text, config.num_virtual_tokens).cpu()
    encoder.initialize(config.prefix_init, text)
    return encoder


@torch.no_grad()
def text_prefix(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int
) -> torch.Tensor:
    """The keys and values that the frozen model computes for `text`: (layers, 2, heads, num_virtual_tokens, head_dim).

    A text of fewer tokens is repeated, a longer one cut. Raises UserError if the text has no token at all.
    """
    ids = tokenizer(text, split_special_tokens=True).input_ids
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]).float()
