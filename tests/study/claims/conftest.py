"""A lab that trains nothing, for which the test gives the figures of each trial; and a small case in float64."""

import pytest
import torch
from models import examples_of, random_bloom, random_prefix

from prefix_tuning.model.batch import pack
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured

TINY = Scale(
    steps=2, rows_per_step=2, seeds=(1,), lengths=(1, 4, 16), sizes=(2, 50, 60), length_rows=8, kept=(2, 4, 64), scored=8
)


class StagedLab(Lab):
    """figures(trial) returns the training loss, the held-out loss and the exact match.

    jobs: what `run` returns for each item; None: the exact match of its trial, as `experiments.unlock` wants it.
    """

    def __init__(self, figures, jobs=None):
        super().__init__(TINY)
        self.figures, self.jobs = figures, jobs

    def run(self, function, items):
        return [self.jobs or {"exact_match": self.figures(job.trial)[2]} for job in items]

    def run_trials(self, trials, by=None):
        found = ((key, *self.figures(trial)) for key, trial in trials.items())
        return {
            key: Measured(0.01, {"0.01": loss, "0.03": None}, [train], [loss], [share]) for key, train, loss, share in found
        }


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def staged():
    """Runs a claim on staged figures; returns which of its parts agree."""

    def run(claim, figures, jobs=None):
        finding = claim(StagedLab(figures, jobs))
        assert len({len(row) for row in finding.table}) == 1 and finding.charts
        return [part.agrees for part in finding.parts]

    return run


@pytest.fixture
def in_float64():
    """A random Bloom in float64, three rows of different lengths, a prefix of 4 tokens, and the rows packed."""
    model, examples = random_bloom(dtype=torch.float64), examples_of([9, 4, 17], prompt_share=0.6)
    return model, examples, random_prefix(model, tokens=4).double(), next(pack(examples, 1000))
