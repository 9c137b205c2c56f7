"""Where the weights of a prefix begin: random, zero, the keys and values of a text, or an earlier run's."""

import torch
from transformers import PreTrainedTokenizerBase

from prefix_tuning.base_model.identity import check_base
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.model.bloom import PackedModel
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.teacher import read_pairs, text_tokens


def new_encoder(
    config: PrefixConfig,
    base: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix_init: str,
    init_text: str | None,
    init_from: str = "first",
    freeze_first_token: bool = False,
    distilled: list[int] | None = None,
    max_tokens: int | None = None,
) -> PrefixEncoder:
    """An encoder for this base, on the CPU in float32. torch's seed decides the random weights.

    prefix_init, init_text, init_from, freeze_first_token: train.py's flags. distilled: the tokens of the text that is
    distilled, for a start from a text without init_text. max_tokens: of a pass that reads the text; None: all of them.
    Raises UserError if the text has no token.
    """
    encoder, pairs = PrefixEncoder(config), None
    if prefix_init == "text":
        ids = text_tokens(tokenizer, init_text) if init_text else distilled or []
        pairs = start_pairs(base, ids, config.num_virtual_tokens, init_from, max_tokens).cpu()
    encoder.initialize(prefix_init, pairs, freeze_first_token)
    return encoder


def earlier_encoder(prefix_from: str, fingerprint: dict, force: bool) -> PrefixEncoder:
    """The encoder that an earlier run left in its folder, on the CPU in float32. Raises UserError if it does not fit the
    base with this `fingerprint`, unless `force` allows other weights.
    """
    encoder, recorded = load_encoder(prefix_from)
    check_base(encoder.bake().shape, recorded, fingerprint, prefix_from, force)
    return encoder


def text_prefix(base: PackedModel, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int) -> torch.Tensor:
    """`start_pairs` from the first tokens of a text."""
    # A row brings its own BOS.
    return start_pairs(base, text_tokens(tokenizer, text), num_virtual_tokens)


def start_pairs(
    base: PackedModel, ids: list[int], num_virtual_tokens: int, init_from: str = "first", max_tokens: int | None = None
) -> torch.Tensor:
    """The keys and values that the frozen model computes for a text: (layers, 2, heads, num_virtual_tokens, head_dim), in
    float32.

    ids: its tokens. A text of fewer tokens is repeated. Of a longer one, the pairs of the first tokens are taken, or, if
    init_from is chunks, pairs at even steps of the whole text, from the first one on; teacher.py explains their positions.
    Raises UserError if the text has no token at all.
    """
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    if init_from == "chunks" and len(ids) > num_virtual_tokens:
        pairs = read_pairs(base, ids, max_tokens or len(ids), first_position=num_virtual_tokens - len(ids))
        return pairs[:, :, :, torch.arange(num_virtual_tokens) * len(ids) // num_virtual_tokens].float()
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    return read_pairs(base, ids, max_tokens or len(ids)).float()
