"""Two prefixes together: the keys of one with the values of the other, one after the other, and what lies between them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import PackedModel
from prefix_tuning.study.scoring import score_prefix

STEPS = 10  # from one prefix to the other


def mixtures(
    base: PackedModel,
    rows: dict[str, list[Batch]],
    first: torch.Tensor,
    second: torch.Tensor,
    advance: Callable[[int], object] = lambda rows: None,
) -> dict:
    """Scores of combinations of two prefixes (L, 2, H, P, D), on each set of rows.

    rows: batches by the name of their dataset. advance: is called with the number of rows that have passed through the base;
    together, each row passes `passes_of_mixtures` times. Returns

    alone: first, second
    after: one after the other: [first, second] and [second, first]
    exchanged: first's keys with second's values, second's keys with first's values
    between: (1 - t) * first + t * second, for t = 0, 0.1 ... 1
    cosine: of keys and of values, by layer (2, L): between vectors of the same head and token, mean over these

    The last three need prefixes of the same length, and are None otherwise.
    """
    variants = {"alone": [first, second], "after": [torch.cat(pair, dim=3) for pair in ((first, second), (second, first))]}
    equal = first.shape == second.shape
    if equal:
        variants["exchanged"] = [mix(first, second), mix(second, first)]
        variants["between"] = [torch.lerp(first, second, step / STEPS) for step in range(1, STEPS)]

    def score_on_all(prefix: torch.Tensor) -> dict[str, dict[str, float]]:
        found = {}
        for name, batches in rows.items():
            found[name] = score_prefix(base, batches, prefix)._asdict()
            advance(sum(batch.rows for batch in batches))
        return found

    found = {kind: [score_on_all(prefix) for prefix in prefixes] for kind, prefixes in variants.items()}
    if equal:  # t = 0 and t = 1 are scored already
        found["between"] = [found["alone"][0], *found["between"], found["alone"][1]]
    cosine = F.cosine_similarity(first, second, dim=-1).mean(dim=(2, 3)).T.tolist() if equal else None
    return {"exchanged": None, "between": None, **found, "cosine": cosine}


def passes_of_mixtures(first: torch.Tensor, second: torch.Tensor) -> int:
    """How often `mixtures` runs the rows through the base."""
    return 4 + (2 + STEPS - 1 if first.shape == second.shape else 0)


def mix(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A prefix (L, 2, H, P, D) with the keys of one prefix and the values of another."""
    return torch.stack((keys[:, 0], values[:, 1]), dim=1)
