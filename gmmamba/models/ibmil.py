"""IBMIL: attention pooling, deconfounded by a dictionary of slide features (Lin et al., CVPR 2023).

Shapes: N instances, D feature width, K confounders, L query width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, normalize, one_hot

from gmmamba.grouping import k_means
from gmmamba.models import known
from gmmamba.models.bag import Bag, MILModel, MILOutput

MERGES = ("cat", "add", "sub")


class IBMIL(MILModel):
    """Stage 1 is plain attention pooling of the features as they are: a = softmax of Lin(tanh(Lin x)), M = sum a x,
    logits = Lin(M). Stage 2 is a new model, whose classifier sees beside M a mean of the K confounders, weighted by
    their likeness to M. The confounders are the means of clusters of the training slides' M of stage 1
    (`start_from`); they are in the state dict and are not trained. Until then they are zero, and training is refused.

    Each class has a probability of its own, sigmoid(logit): how these become logits whose softmax is the pipeline's
    probabilities, and what became of the published thresholds, tuned on the slides that are tested: see DSMIL. (The
    published code chooses its epoch on them, too; the pipeline never does.) Its dropout is never applied, so there is
    none.

    Args:
        in_dim: D.
        stage: 1 or 2.
        confounders: K.
        hidden: L.
        merge: how M and the confounders' mean c enter the classifier: "cat" [M; c], "add" M + c, "sub" M - c.
    """

    confounders: Tensor
    """(K, D)."""
    filled: Tensor
    """(K,) bool, which rows are confounders: with fewer training slides than K not all."""

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        stage: int = 2,
        confounders: int = 8,
        hidden: int = 128,
        merge: str = "cat",
    ):
        super().__init__()
        if stage not in (1, 2):
            raise ValueError(f"stage is {stage}: IBMIL has the stages 1 and 2")
        self.merge = known("merge", merge, MERGES)
        self.width = 2 * in_dim if stage == 2 and merge == "cat" else in_dim
        self.attention = nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, 1))
        self.classifier = nn.Linear(self.width, n_classes)
        self.query = nn.Linear(in_dim, hidden) if stage == 2 else None
        self.key = nn.Linear(in_dim, hidden) if stage == 2 else None
        self.may_train = stage == 1
        if stage == 2:
            self.register_buffer("confounders", torch.zeros(confounders, in_dim))
            self.register_buffer("filled", torch.ones(confounders, dtype=torch.bool))

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is a. The details hold the published outputs: `logits`, before sigmoid, and `probs` (1, C),
        `bag_feat`, what the classifier sees, and `attn_or_deconf_attn`: a (1, N), in stage 2 the weights of the
        confounders (K, 1)."""
        feature, attention, weights = self.pool(bag)
        logits = self.classifier(feature)
        details = {"logits": logits, "probs": logits.sigmoid(), "bag_feat": feature, "attn_or_deconf_attn": weights}
        return MILOutput(logsigmoid(logits), attention, details)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """What the classifier sees, and a."""
        return self.pool(bag)[:2]

    def pool(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """What the classifier sees (1, width), a (N,) without gradient, weights (1, N) or (K, 1)."""
        a = self.attention(bag.features).T.softmax(1)
        M = a @ bag.features
        if self.query is None or self.key is None:
            return M, a[0].detach(), a
        scores = self.key(self.confounders) @ self.query(M).T / self.query.out_features**0.5  # (K, 1)
        weights = scores.masked_fill(~self.filled[:, None], -torch.inf).softmax(0)
        c = weights.T @ self.confounders
        merged = torch.cat([M, c], 1) if self.merge == "cat" else M + c if self.merge == "add" else M - c
        return merged, a[0].detach(), weights

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        """ValueError in stage 2 without confounders."""
        if not self.may_train:  # asked once: the answer stalls a GPU
            if not self.confounders.any():
                raise ValueError("stage 2 of IBMIL has no confounders: give it those of a trained stage 1 (start_from)")
            self.may_train = True
        return self.losses(self(bag), label)["loss"]

    def losses(self, output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        """`loss`, the binary cross-entropy of each class, and its `target` (1, C)."""
        logits = output.details["logits"].float()
        target = one_hot(label, logits.shape[1]).to(logits)
        return {"loss": binary_cross_entropy_with_logits(logits, target), "target": target}

    @torch.no_grad()
    def start_from(self, first: MILModel, bags: Callable[[], Iterable[Bag]]) -> None:
        """Confounder k becomes the mean of the training slides' M in cluster k. The clusters are those of k-means on
        the M divided by their norms: K, or as many as there are different slides. (scikit-learn's, where the published
        code has faiss: of several good clusterings it may find another.)"""
        M = torch.cat([first.encode(bag)[0] for bag in bags()])  # (slides, D)
        labels = torch.from_numpy(k_means(normalize(M).cpu().numpy(), len(self.confounders), seed=0))
        self.confounders.zero_()
        self.filled.copy_(torch.arange(len(self.filled)) <= labels.max())
        for k in labels.unique().tolist():
            self.confounders[k] = M[labels == k].mean(0)
