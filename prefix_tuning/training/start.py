"""Where the weights of a prefix begin: random, zero, the keys and values of a text, or an earlier run's."""

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from prefix_tuning.base_model.identity import check_base
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.bloom import PackedModel, cached_pairs
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder


def new_encoder(
    config: PrefixConfig, base: PackedModel, tokenizer: PreTrainedTokenizerBase, prefix_init: str, init_text: str | None
) -> PrefixEncoder:
    """An encoder for this base, on the CPU in float32. prefix_init, init_text: train.py's flags. torch's seed decides the
    random weights. Raises UserError if the text has no token.
    """
    encoder = PrefixEncoder(config)
    pairs = text_prefix(base, tokenizer, init_text, config.num_virtual_tokens).cpu() if init_text else None
    encoder.initialize(prefix_init, pairs)
    return encoder


def earlier_encoder(prefix_from: str, fingerprint: dict, force: bool) -> PrefixEncoder:
    """The encoder that an earlier run left in its folder, on the CPU in float32. Raises UserError if it does not fit the
    base with this `fingerprint`, unless `force` allows other weights.
    """
    encoder, recorded = load_encoder(prefix_from)
    check_base(encoder.bake().shape, recorded, fingerprint, prefix_from, force)
    return encoder


@torch.no_grad()
def text_prefix(base: PackedModel, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int) -> torch.Tensor:
    """The keys and values that the frozen model computes for `text`: (layers, 2, heads, num_virtual_tokens, head_dim).

    A text of fewer tokens is repeated, a longer one cut. Raises UserError if the text has no token at all.
    """
    ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids  # a row brings its own BOS
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    cache = DynamicCache()
    base(torch.tensor([ids], device=base.device), **{CACHE: cache})
    return cached_pairs(cache).float()
