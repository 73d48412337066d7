"""DSMIL: two streams, the best instance of each class and what resembles it (Li, Li and Eliceiri, CVPR 2021).

Shapes: N instances, D feature width, L query width, C classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

from gmmamba.models.bag import Bag, MILModel, MILOutput


class DSMIL(MILModel):
    """Each class has its critical instance, the one of the highest instance logit; the instances are pooled by the
    likeness of their queries to its query, and a convolution over the C pooled vectors gives the bag's logits.

    It learns from the bag's logits and the critical instances' alike, by the binary cross-entropy of each class.

    DSMIL gives each class a probability of its own, sigmoid(logit). The logits returned here are the logs of these, so
    that their softmax, the pipeline's probabilities, is the sigmoids over their sum: the same order of classes in a
    slide and, where the sigmoids agree (sum to 1), the sigmoids themselves. Where they do not, two sigmoids rank two
    classes of slides in two ways, and this ranks by p1 / (p0 + p1). The published code tunes a threshold a class on
    the slides that it tests; here the most probable class is predicted, without a threshold.

    Features enter as they are: there is no embedding.

    Args:
        in_dim: D.
        hidden: L.
        nonlinear: whether the query is Lin-ReLU-Lin-Tanh, or one Lin as in older releases.
    """

    def __init__(self, in_dim: int, n_classes: int, hidden: int = 128, nonlinear: bool = True):
        super().__init__()
        self.instance_classifier = nn.Linear(in_dim, n_classes)
        layers = [nn.Linear(in_dim, hidden)]
        self.query = nn.Sequential(*layers, nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh()) if nonlinear else layers[0]
        self.classifier = nn.Conv1d(n_classes, n_classes, in_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.orthogonal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is that of the most probable class.

        The details hold the published outputs: `logits` and `max_logits` before sigmoid, of bag (1, C) and critical
        instances (C,), `probs` (1, C), `ins_logits` and `attn` (N, C), `bag_feat` (1, C, D), `crit_idx` (C,).
        """
        x = bag.features
        instance = self.instance_classifier(x)  # (N, C)
        highest, critical = instance.max(0)
        queries = self.query(x)  # (N, L)
        attention = (queries @ queries[critical].T / queries.shape[1] ** 0.5).softmax(0)  # (N, C)
        pooled = (attention.T @ x)[None]  # (1, C, D)
        logits = self.classifier(pooled)[:, :, 0]  # (1, C)
        details = {"logits": logits, "probs": logits.sigmoid(), "ins_logits": instance, "attn": attention}
        details |= {"bag_feat": pooled, "max_logits": highest, "crit_idx": critical}
        shown = attention.index_select(1, logits.argmax(1))[:, 0]
        return MILOutput(logsigmoid(logits), shown.detach(), details)

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        return self.losses(self(bag), label)["loss"]

    def losses(self, output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        """`loss` and its parts, `bag_loss` and `max_loss`, with the `target` (1, C) of both."""
        logits, highest = (output.details[name].float() for name in ("logits", "max_logits"))
        target = one_hot(label, logits.shape[1]).to(logits)
        bag_loss = binary_cross_entropy_with_logits(logits, target)
        max_loss = binary_cross_entropy_with_logits(highest[None], target)
        return {"loss": (bag_loss + max_loss) / 2, "bag_loss": bag_loss, "max_loss": max_loss, "target": target}
