"""Keys and values of a prefix beside those of real text, and the words nearest to it.

Legend: T tokens, L layers, H heads, P prefix tokens, D head_dim, E = H * D, V vocabulary.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from prefix_tuning.model.attention import attend
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedBlock
from prefix_tuning.study.attention import attending
from prefix_tuning.study.question import token_text
from prefix_tuning.study.scoring import Score, score_prefix

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAREST = 5  # words for each prefix token
WORDS_AT_ONCE = 4096  # words of the vocabulary that are compared at once


@torch.no_grad()
def score_base(base: Bloom, batches: list[Batch]) -> tuple[Score, list[list[list[float]]]]:
    """Runs the base alone once. Returns its score, and the lengths of the keys and values that it computes for text: vectors
    of D numbers, whose QUANTILES over all heads and tokens are (L, 2, 5).
    """
    norms: list[list[torch.Tensor]] = [[] for _ in base.transformer.h]

    def attend_in(layer: int):
        def attend_and_keep_norms(qkv, *others):
            norms[layer].append(qkv[:, :, 1:].float().norm(dim=-1).flatten(0, 1))  # (T * H, 2)
            return attend(qkv, *others)

        return attend_and_keep_norms

    with attending(base, attend_in):
        scored = score_prefix(base, batches, None)
    return scored, [_quantiles(torch.cat(parts).T) for parts in norms]


def prefix_norms(prefix: torch.Tensor) -> list[list[list[float]]]:
    """The same lengths of a prefix (L, 2, H, P, D)."""
    return [_quantiles(layer) for layer in prefix.float().norm(dim=-1).flatten(2)]


def _quantiles(norms: torch.Tensor) -> list[list[float]]:
    return np.quantile(norms.cpu().numpy(), QUANTILES, axis=-1).T.tolist()  # torch.quantile takes 16 million numbers at most


@torch.no_grad()
def nearest_words(base: Bloom, tokenizer: PreTrainedTokenizerBase, prefix: torch.Tensor) -> list[dict]:
    """The words nearest to each token of a prefix (L, 2, H, P, D), in the first layer.

    There, the pair of a word does not depend on its context: key and value are W x + b, where x (E) is the word's embedding
    after the layer norms. For each prefix token, least squares find the x that best gives its pair. This x is compared with
    the x of every word.

    words: the nearest and their cosines. unexplained: the part of the pair that no x can give, as a share of its length.
    """
    body = base.transformer
    block = cast(PackedBlock, body.h[0])
    attention = block.self_attention
    shape = (attention.num_heads, 3, attention.head_dim)
    linear = attention.query_key_value
    weight = linear.weight.float().view(*shape, -1)[:, 1:].transpose(0, 1).flatten(0, 2)  # (2 * E, E): keys, then values
    bias = linear.bias.float().view(shape)[:, 1:].transpose(0, 1).flatten()
    pairs = prefix[0].float().movedim(2, 0).flatten(1) - bias  # (P, 2 * E)
    solution = torch.linalg.lstsq(weight.cpu(), pairs.T.cpu()).solution  # on the CPU: Apple's mps has none
    found = solution.T.to(pairs.device)  # (P, E)
    unexplained = (found @ weight.T - pairs).norm(dim=1) / pairs.norm(dim=1)
    cosines = torch.cat(
        [
            F.normalize(found, dim=1)
            @ F.normalize(block.input_layernorm(body.word_embeddings_layernorm(words)).float(), dim=1).T
            for words in base.gathered(body.word_embeddings.weight).split(WORDS_AT_ONCE)
        ],
        dim=1,
    )
    likeliest = zip(*(part.tolist() for part in cosines.topk(NEAREST)), unexplained.tolist(), strict=True)
    return [
        {
            "words": [[token_text(tokenizer, token), cosine] for cosine, token in zip(near, ids, strict=True)],
            "unexplained": share,
        }
        for near, ids, share in likeliest
    ]
