"""Keys and values of a prefix beside those of real text, and the words nearest to it.

Legend: T tokens, L layers, H heads of queries, G heads of keys and values (H in Bloom), P prefix tokens, D head_dim,
E = H * D, V vocabulary.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from prefix_tuning.model.batch import IGNORED, Batch, Example, pack
from prefix_tuning.model.bloom import Bloom, PackedBlock, PackedModel
from prefix_tuning.study.attention import attending, running
from prefix_tuning.study.question import token_text
from prefix_tuning.study.scoring import Score, score_prefix

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAREST = 5  # words for each prefix token
WORDS_AT_ONCE = 4096  # words of the vocabulary that are compared at once


@torch.no_grad()
def score_base(base: PackedModel, batches: list[Batch]) -> tuple[Score, list[list[list[float]]]]:
    """Runs the base alone once. Returns its score, and the lengths of the keys and values that it computes for text: vectors
    of D numbers, whose QUANTILES over all heads and tokens are (L, 2, 5).
    """
    norms: list[list[torch.Tensor]] = [[] for _ in range(base.config.num_hidden_layers)]
    own = base.attend_in

    def attend_in(layer: int):
        def attend_and_keep_norms(qkv, *others, **scores):
            norms[layer].append(qkv[:, :, -2:].float().norm(dim=-1).flatten(0, 1))  # (T * G, 2)
            return own(layer)(qkv, *others, **scores)

        return attend_and_keep_norms

    with attending(base, attend_in):
        scored = score_prefix(base, batches, None)
    return scored, [_quantiles(torch.cat(parts).T) for parts in norms]


def prefix_norms(prefix: torch.Tensor) -> list[list[list[float]]]:
    """The same lengths of a prefix (L, 2, G, P, D)."""
    return [_quantiles(layer) for layer in prefix.float().norm(dim=-1).flatten(2)]


def _quantiles(norms: torch.Tensor) -> list[list[float]]:
    return np.quantile(norms.cpu().numpy(), QUANTILES, axis=-1).T.tolist()  # torch.quantile takes 16 million numbers at most


@torch.no_grad()
def nearest_words(base: PackedModel, tokenizer: PreTrainedTokenizerBase, prefix: torch.Tensor) -> list[dict]:
    """The words nearest to each token of a prefix (L, 2, G, P, D), in the first layer.

    There, the pair of a word does not depend on its context. In Bloom, prefix and words are compared as embeddings
    (`compare_embeddings`), in other families as pairs (`compare_pairs`).

    words: the nearest and their cosines. unexplained: the part of the pair that no embedding can give, as a share of its
    length; None in other families.
    """
    if isinstance(base, Bloom):
        cosines, shares = compare_embeddings(base, prefix)
        unexplained: list[float | None] = shares.tolist()
    else:
        cosines, unexplained = compare_pairs(base, prefix), [None] * prefix.shape[3]
    likeliest = zip(*(part.tolist() for part in cosines.topk(NEAREST)), unexplained, strict=True)
    return [
        {
            "words": [[token_text(tokenizer, token), cosine] for cosine, token in zip(near, ids, strict=True)],
            "unexplained": share,
        }
        for near, ids, share in likeliest
    ]


def compare_embeddings(base: Bloom, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines of prefix tokens and words (P, V), and the part of each prefix token that no embedding gives (P,).

    In Bloom, key and value of a word are W x + b, where x (E) is the word's embedding after the layer norms. For each prefix
    token, least squares find the x that best gives its pair. This x is compared with the x of every word.
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
    cosines = [
        F.normalize(found, dim=1)
        @ F.normalize(block.input_layernorm(body.word_embeddings_layernorm(words)).float(), dim=1).T
        for words in base.gathered(body.word_embeddings.weight).split(WORDS_AT_ONCE)
    ]
    return torch.cat(cosines, dim=1), unexplained


def compare_pairs(base: PackedModel, prefix: torch.Tensor) -> torch.Tensor:
    """The cosines of the pairs of prefix tokens and words (P, V), both without the mean pair of all words.

    Keys may be normalised, so no linear map leads back to an embedding. Keys are rotated by their position, and a prefix is
    learned as keys are after that. So each word gets the position of the prefix token that it is compared with.
    """
    vocabulary = torch.arange(base.config.vocab_size).split(WORDS_AT_ONCE)
    found = []
    for token, own in enumerate(prefix[0].float().movedim(2, 0).flatten(1)):  # (2 * G * D)
        # A row begins where its prefix ends, so after `token` prefix tokens.
        words = torch.cat([_first_pairs(base, part, prefix[:, :, :, :token]) for part in vocabulary])
        mean = words.mean(dim=0)
        found.append(F.cosine_similarity(own - mean, words - mean, dim=1))
    return torch.stack(found)


def _first_pairs(base: PackedModel, words: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Key and value of each word in the first layer, as the only token of a row after a prefix: (words, 2 * G * D)."""
    found = []

    def attend_and_keep(qkv, *others, **scores):
        found.append(qkv[:, :, -2:].float().transpose(1, 2).flatten(1))
        return qkv[:, :, :-2].flatten(1, 2)  # what comes after the first pairs does not matter

    def first_alone(layer: int, forward: Callable) -> Callable:
        return forward if layer == 0 else lambda hidden, *others, **options: hidden

    (batch,) = pack([Example([word], [IGNORED]) for word in words.tolist()], max_tokens=WORDS_AT_ONCE)
    with attending(base, lambda layer: attend_and_keep), running(base, first_alone):
        base.packed_hidden(batch.to(base.device), prefix)
    return found[0]
