"""The loss of a prefix that is to do what a teacher does: a text in front of the row, or a longer prefix.

Legend: N labels, V vocabulary, L layers, H heads of keys and values, D head_dim, E hidden size, S pairs of the teacher, P
pairs of the prefix.

The keys and values that a base computes for a text of S tokens are a prefix of S pairs. So teacher and student are the same
frozen base, and the same packed forward of it: once after the teacher's pairs, which are constant, and once after the
prefix, which is trained:

    t_n = log softmax(logits after the teacher's pairs)      (V)
    s_n = log softmax(logits after the prefix)               (V)

    KL_n = sum_v exp(t_n[v]) * (t_n[v] - s_n[v])             nats, at least 0, and 0 where both predict the same

Cross-entropy asks for one token at each label. The divergence asks for the teacher's probabilities of all V tokens, so a
label says more: how likely the text makes every other answer, too. The labels themselves are only read: teacher and student
predict the next token after the same tokens of an answer.

`alpha` mixes in the cross-entropy of the row's own labels: (1 - alpha) * KL_n + alpha * CE_n.

Sources: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531; for a text
that becomes a prefix, Eyuboglu et al. 2025, "Cartridges", https://arxiv.org/abs/2506.06266.
"""

from dataclasses import dataclass

import torch

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import FrozenHeadLoss, PackedModel, head_logits


class FrozenHeadDivergence(FrozenHeadLoss):
    """KL_n of the formula above, for each of N labels, from hidden (N, E) of the prefix and `teacher` (N, E), its hidden.

        d KL_n / d logits_n = exp(s_n) - exp(t_n)

    Both go through the same head. As in FrozenHeadLoss, the forward pass computes the gradient while a slice's logits exist,
    only `hidden` gets one, and at most LABELS_AT_ONCE rows of logits exist at any time, here for both. Raises ValueError if
    any other input requires a gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher, bias=None, cap=None):
        if any(ctx.needs_input_grad[1:]):
            raise ValueError("the lm_head and the teacher must be frozen: this loss has no gradient for them")

        def divergence(part, ours, wants_error):
            theirs = head_logits(teacher[part], weight, bias, cap).log_softmax(-1)
            expected = theirs.exp()
            losses = theirs.sub_(ours).mul_(expected).sum(-1)
            return losses, ours.exp_().sub_(expected) if wants_error else None

        return FrozenHeadLoss.slice_by_slice(ctx, hidden, weight, bias, cap, divergence)


@dataclass
class Distillation:
    """The Objective of a prefix that learns from a teacher, in place of the base's own loss.

    teacher: the teacher's pairs, (L, 2, H, S, D), on the base's device. alpha: from 0 to 1, see above.
    """

    base: PackedModel
    teacher: torch.Tensor
    alpha: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.base.device

    def label_losses(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        """(1 - alpha) * KL_n + alpha * CE_n in nats at every label of the batch: (N,), at least float32.

        prefix: (L, 2, H, P, D), or None for the base alone.
        """
        labels, batch = len(batch.labels), self.base.filled(batch)
        return self._losses(batch, self.base.packed_hidden(batch, prefix))[:labels]

    @torch.no_grad()
    def label_scores(self, batch: Batch, prefix: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`label_losses`, without gradients, and the likeliest token at each label, after the prefix: (N,), int64."""
        labels, batch = len(batch.labels), self.base.filled(batch)
        hidden = self.base.packed_hidden(batch, prefix)
        _, likeliest = self.base.head_scores(hidden, batch.labels)
        return self._losses(batch, hidden)[:labels], likeliest[:labels]

    def _losses(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """The losses of hidden (N, E), the output of `packed_hidden` after the prefix: (N,).

        The teacher's hidden states are computed anew for each pass. To keep them for all passes would take N x E numbers on
        a disk, and its probabilities N x V.
        """
        with torch.no_grad():
            teacher = self.base.packed_hidden(batch, self.teacher)
        (theirs, ours), weight, bias, cap = self.base.head_inputs(torch.stack((teacher, hidden)))
        losses = FrozenHeadDivergence.apply(ours, weight, theirs.detach(), bias, cap)
        if self.alpha:
            own = FrozenHeadLoss.apply(ours, weight, batch.labels, bias, cap)
            losses = (1 - self.alpha) * losses + self.alpha * own
        return losses
