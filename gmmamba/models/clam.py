"""CLAM: attention pooling with an instance loss on what the attention ranks highest and lowest (Lu et al., Nature
Biomedical Engineering 2021).

Shapes: N instances, D feature width, M embedding width, L attention width, C classes, K rows of attention (1 or C),
k instances of each end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from gmmamba.models import known
from gmmamba.models.abmil import GatedAttention
from gmmamba.models.bag import Bag, MILModel, MILOutput

BRANCHES = ("single", "multi")
INSTANCE_LOSSES = ("svm", "ce")


class CLAM(MILModel):
    """CLAM-SB (branches "single"): one attention, logits = Lin(A h). CLAM-MB ("multi"): an attention and a
    classifier a class.

    Its training adds the instance loss: a head a class tells the k instances of highest attention from the k of
    lowest. With `subtyping`, classes exclude each other: the heads of the other classes see the highest as negatives.

    Two traps of the published code are avoided. Its top-k fails on a slide of fewer than k patches; here such a slide
    gives all of them to both ends. And its attention net drops 0.25 whatever is asked; here `attention_dropout` is
    what is dropped.

    Args:
        in_dim: D.
        branches: "single" or "multi".
        width: M.
        hidden: L.
        dropout: after the embedding's ReLU.
        attention_dropout: after the attention's tanh and sigmoid.
        instance_loss: "svm", the smooth top-1 SVM of the published commands, or "ce", cross-entropy.
        instances: k.
        subtyping: False where the first class is the absence of the others, as published for tumour against normal.
        bag_weight: share of the slide's cross-entropy in the loss; the instance loss has the rest.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        branches: str = "single",
        width: int = 512,
        hidden: int = 256,
        dropout: float = 0.25,
        attention_dropout: float = 0.25,
        instance_loss: str = "svm",
        instances: int = 8,
        subtyping: bool = True,
        bag_weight: float = 0.7,
    ):
        super().__init__()
        self.multi = known("branches", branches, BRANCHES) == "multi"
        self.instance_loss = known("instance_loss", instance_loss, INSTANCE_LOSSES)
        self.width, self.instances, self.subtyping, self.bag_weight = width, instances, subtyping, bag_weight
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(width, hidden, n_classes if self.multi else 1, dropout=attention_dropout)
        outputs = [1] * n_classes if self.multi else [n_classes]
        self.classifiers = nn.ModuleList(nn.Linear(width, n) for n in outputs)  # one a row of attention
        self.instance_classifiers = nn.ModuleList(nn.Linear(width, 2) for _ in range(n_classes))

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is A, of CLAM-MB that of the most probable class. The details hold the scores before softmax,
        `attn_raw` (K, N), and the embeddings, `instances` (N, M)."""
        h = self.embed(bag.features)
        raw = self.attention(h)  # (K, N)
        attention = raw.softmax(1)
        features = attention @ h  # (K, M)
        logits = torch.cat([classify(row) for classify, row in zip(self.classifiers, features, strict=True)])[None]
        shown = attention.index_select(0, logits.argmax(1)) if self.multi else attention
        return MILOutput(logits, shown[0].detach(), {"attn_raw": raw, "instances": h})

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Of CLAM-SB; CLAM-MB has a feature a class."""
        if self.multi:
            raise NotImplementedError("CLAM-MB has no one slide feature: use branches: single")
        h = self.embed(bag.features)
        attention = self.attention(h).softmax(1)
        return attention @ h, attention[0].detach()

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        return self.losses(self(bag), label)["loss"]

    def losses(self, output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        """`loss`, its parts `bag_loss` and `inst_loss`, and what the heads were asked, (C, 2k) each, highest first:
        `inst_labels`, `inst_preds` and whether it counts, `inst_counted`."""
        h, A = output.details["instances"], output.details["attn_raw"].softmax(1)
        C = len(self.instance_classifiers)
        k = min(self.instances, len(h))
        ends = torch.cat([A.topk(k).indices, (-A).topk(k).indices], 1).expand(C, 2 * k)
        heads = zip(self.instance_classifiers, ends, strict=True)
        scores = torch.stack([head(h[chosen]) for head, chosen in heads]).float()  # (C, 2k, 2)
        # All classes alike, with what does not count at weight 0: asking for the label's value would stall a GPU.
        own = torch.arange(C, device=label.device)[:, None] == label
        highest = torch.arange(2 * k, device=label.device) < k
        labels = (own & highest).long()
        counted = own | highest if self.subtyping else own.expand_as(labels)
        row_loss = smooth_svm if self.instance_loss == "svm" else cross_entropy_rows
        rows = row_loss(scores.flatten(0, 1), labels.flatten()).view_as(labels)
        of_class = (rows * counted).sum(1) / counted.sum(1).clamp(min=1)
        inst_loss = of_class.sum() / (C if self.subtyping else 1)
        bag_loss = cross_entropy(output.logits.float(), label)
        loss = self.bag_weight * bag_loss + (1 - self.bag_weight) * inst_loss
        asked = {"inst_labels": labels, "inst_preds": scores.argmax(2), "inst_counted": counted}
        return {"loss": loss, "bag_loss": bag_loss, "inst_loss": inst_loss} | asked


def smooth_svm(scores: Tensor, labels: Tensor) -> Tensor:
    """The smooth top-1 SVM loss (Berrada, Zisserman and Kumar, ICLR 2018; alpha = tau = 1) of each row.

    scores: (R, C); labels: (R,). A row whose two highest scores are ln(1000) or more apart takes the maximum instead
    of the logsumexp.
    """
    margins = scores + 1 - one_hot(labels, scores.shape[1])
    first, second = scores.topk(2, 1).values.T
    hardest = torch.where(first - second >= math.log(1000), margins.amax(1), margins.logsumexp(1))
    return hardest - scores.gather(1, labels[:, None])[:, 0]


def cross_entropy_rows(scores: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(scores, labels, reduction="none")
