"""What is trained: the prefix of this package, and what the papers compare it with.

Legend: L layers, H heads, P prefix tokens, D head_dim; R rows, S tokens of the longest row.

`optimizer_step` (training/loop.py) trains whatever emits a prefix (L, 2, H, P, D): it needs the call, `bake` and the
parameters. So each method here is such a module, and the mechanism stays as it is.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from prefix_tuning.model.attention import alibi_slopes, attend_padded
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, cached_pairs, empty_prefix
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.study.attention import attending
from prefix_tuning.study.mixing import mix
from prefix_tuning.study.scoring import label_logits
from prefix_tuning.training.start import text_prefix

RELATED = "请简短回答问题。"  # "answer the question briefly": words that name the task
UNRELATED = "大象、分开、蓝色。"  # "elephant, divide, blue"


class Emitter(nn.Module):
    """Emits a prefix, as PrefixEncoder does."""

    @torch.no_grad()
    def bake(self) -> torch.Tensor:
        """The prefix as one constant tensor (L, 2, H, P, D)."""
        return self()


class SeparateEncoders(Emitter):
    """Keys from one embedding and MLP, values from another, nothing shared (Le et al. 2025, arXiv 2410.02200)."""

    def __init__(self, config: PrefixConfig):
        super().__init__()
        self.keys, self.values = PrefixEncoder(config), PrefixEncoder(config)  # half of each output is unused

    def forward(self) -> torch.Tensor:
        return mix(self.keys(), self.values())


class FixedKeys(Emitter):
    """Values from an MLP behind keys that never change. keys: (L, H, P, D)."""

    keys: torch.Tensor

    def __init__(self, config: PrefixConfig, keys: torch.Tensor):
        super().__init__()
        self.values = PrefixEncoder(config)
        self.register_buffer("keys", keys)

    def forward(self) -> torch.Tensor:
        return torch.stack((self.keys, self.values()[:, 1]), dim=1)


class EmbeddingOnly(Emitter):
    """Prompt tuning: P trained embeddings in front of the text (Li & Liang 2021, section 7.2; Lester et al. 2021).

    They attend to nothing of the text, so the frozen base computes the same keys and values from them for all rows. These
    form a prefix, but only one that P inputs can produce. The embeddings start as those of P words drawn at random.
    """

    def __init__(self, base: Bloom, tokens: int):
        super().__init__()
        words = base.transformer.word_embeddings.weight
        self.embeddings = nn.Parameter(words[torch.randint(len(words), (tokens,))].clone())
        self.read = partial(base.transformer, use_cache=True)  # no submodule: the base is not trained

    def forward(self) -> torch.Tensor:
        cache = DynamicCache()
        self.read(None, cache, inputs_embeds=self.embeddings.unsqueeze(0))
        return cached_pairs(cache)


def attend_infix(
    qkv: torch.Tensor, pairs: torch.Tensor, batch: Batch, bias: torch.Tensor, label_positions_only: bool
) -> torch.Tensor:
    """Infix tuning (Li & Liang 2021, section 7.3): the pairs stand inside the row, before the last token of its prompt.

    The output of that token is the first that predicts the answer, so all positions that predict see the pairs, and no other
    does. Tokens after the pairs are P positions farther from those before. pairs: (2, H, P, D).
    """
    length = pairs.shape[2]
    first = torch.tensor(batch.first_labels, device=qkv.device)[:, None]  # the index in its row of the prompt's last token
    token = torch.arange(batch.max_length, device=qkv.device)
    positions = token + length * (token >= first)  # (R, S)
    keys = torch.cat((first + torch.arange(length, device=qkv.device), positions), dim=1)  # (R, P + S)
    distance = keys[:, None, :] - positions[:, :, None]  # (R, S, P + S), negative before the query
    slopes = alibi_slopes(qkv.shape[1]).to(bias)  # (H)
    own = (slopes[:, None, None] * distance[:, None]).masked_fill(distance[:, None] > 0, -torch.inf)
    return attend_padded(qkv, pairs, batch, own)


class TrainableBloom(Bloom):
    """A Bloom whose own weights are trained: the loss has gradients for all of them, including the head's."""

    def label_losses(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        return F.cross_entropy(label_logits(self, batch, prefix), batch.labels, reduction="none")


class FullTuning(Emitter):
    """All weights of a copy of the base, and a prefix of no tokens. The backward pass leaves gradients in these weights."""

    def __init__(self, base: Bloom):
        super().__init__()
        self.base = copy.deepcopy(base).requires_grad_()
        self.base.__class__ = TrainableBloom

    def forward(self) -> torch.Tensor:
        return empty_prefix(self.base.config).requires_grad_()


Encoder = PrefixEncoder | Emitter


class Method(NamedTuple):
    """A way to adapt the base.

    make: called with the frozen base, its tokenizer and P; returns what is trained. first_rate: the index of the rate that
    the search begins with (learning_rate.rate_at).
    """

    make: Callable[[Bloom, PreTrainedTokenizerBase, int], Encoder]
    first_rate: int
    infix: bool = False

    def attention(self, base: Bloom) -> AbstractContextManager[None]:
        """Around every forward pass of this method."""
        return attending(base, lambda layer: attend_infix) if self.infix else nullcontext()


def emitter(
    base: Bloom, tokenizer: PreTrainedTokenizerBase, tokens: int, projection: bool = True, text: str = ""
) -> Encoder:
    """The encoder of this package at a random start, or from the pairs of a text."""
    encoder = PrefixEncoder(PrefixConfig.of(base.config, tokens, prefix_projection=projection))
    if text:
        encoder.initialize("text", text_prefix(base, tokenizer, text, tokens))
    return encoder


def fixed_normal(base: Bloom, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Encoder:
    config = PrefixConfig.of(base.config, tokens)
    return FixedKeys(config, torch.randn_like(PrefixEncoder(config).bake()[:, 0]))


def fixed_words(base: Bloom, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Encoder:
    return FixedKeys(PrefixConfig.of(base.config, tokens), EmbeddingOnly(base, tokens).bake()[:, 0])


METHODS = {
    "prefix": Method(emitter, -4),
    "direct": Method(partial(emitter, projection=False), -1),
    "separate": Method(lambda base, _, tokens: SeparateEncoders(PrefixConfig.of(base.config, tokens)), -4),
    "related": Method(partial(emitter, text=RELATED), -4),
    "unrelated": Method(partial(emitter, text=UNRELATED), -4),
    "direct from text": Method(partial(emitter, projection=False, text=RELATED), -1),
    "fixed normal": Method(fixed_normal, -4),
    "fixed words": Method(fixed_words, -4),
    "embeddings": Method(lambda base, _, tokens: EmbeddingOnly(base, tokens), -2),
    "infix": Method(emitter, -4, infix=True),
    "full": Method(lambda base, *_: FullTuning(base), -6),
}
