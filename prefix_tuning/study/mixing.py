"""Two prefixes: what each half of one does with the other's, and what lies between them."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.scoring import score

STEPS = 10  # of the way from one prefix to the other


def mixtures(base: Bloom, rows: dict[str, list[Batch]], first: torch.Tensor, second: torch.Tensor) -> dict:
    """Scores of what can be made of two prefixes (L, 2, H, P, D), on each set of rows.

    rows: batches by the name of their dataset.
    alone: first, second.
    after: both prefixes, one after the other: [first, second] and [second, first]; of any lengths.
    exchanged: the keys of one with the values of the other: first's keys and second's values, second's and first's.
    between: (1 - t) * first + t * second, for t = 0, 0.1 ... 1.
    cosine: of keys and of values, by layer (2, L): the mean over heads and tokens of the cosine between pairs of one place.

    The last three need prefixes of one length, and are None otherwise.
    """
    variants = {"alone": [first, second], "after": [torch.cat(pair, dim=3) for pair in ((first, second), (second, first))]}
    equal = first.shape == second.shape
    if equal:
        variants["exchanged"] = [torch.stack((a[:, 0], b[:, 1]), dim=1) for a, b in ((first, second), (second, first))]
        variants["between"] = [torch.lerp(first, second, step / STEPS) for step in range(STEPS + 1)]
    jobs = [(kind, prefix, name) for kind, prefixes in variants.items() for prefix in prefixes for name in rows]
    found: dict[str, list[dict]] = {kind: [{} for _ in prefixes] for kind, prefixes in variants.items()}
    places = {kind: iter([line for line in lines for _ in rows]) for kind, lines in found.items()}
    for kind, prefix, name in tqdm(jobs, desc="two prefixes", leave=False):
        next(places[kind])[name] = score(base, rows[name], prefix)._asdict()
    cosine = F.cosine_similarity(first, second, dim=-1).mean(dim=(2, 3)).T.tolist() if equal else None
    return {"exchanged": None, "between": None, **found, "cosine": cosine}
