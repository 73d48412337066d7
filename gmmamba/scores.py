"""The numbers of an evaluation, for one weighting of the slides or for thousands at once, as a bootstrap needs them.

S units (slides or patients), C classes, B weightings. Training has metrics of its own (gmmamba.metrics), which are the
same where the names are. A score that the units at hand leave undefined is nan, never a made-up 0.5.

accuracy, balanced_accuracy, macro_f1   of the called classes
sensitivity, specificity                of the positive class of two; of more the means over classes
f1_positive                             of two classes; nan for more
auroc, auprc                            of two classes; of more the means of one class versus the rest
brier                                   of two classes mean (P(positive) - y)²; of more the sum over classes, as
                                        scikit-learn has it
log_loss                                mean -log P(true class), natural logarithm
ece                                     expected calibration error: 15 bins of equal width of the highest probability
                                        (Guo et al. 2017)
f1[x], sensitivity[x], specificity[x]   of class x versus the rest; auroc[x], auprc[x] where there are more than two
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LOSSES = ("brier", "log_loss", "ece")  # lower is better
OVERALL = (
    "accuracy", "balanced_accuracy", "macro_f1", "f1_positive", "auroc", "auprc", "sensitivity", "specificity", *LOSSES,
)  # fmt: skip
ECE_BINS = 15


def score_names(classes: Sequence[str]) -> list[str]:
    """The names of all scores of these classes, in the order of the tables."""
    kinds = ["f1", "sensitivity", "specificity", *(["auroc", "auprc"] if len(classes) > 2 else [])]
    return [*OVERALL, *(f"{kind}[{name}]" for kind in kinds for name in classes)]


def scores(
    true: np.ndarray,
    probabilities: np.ndarray,
    called: np.ndarray,
    classes: Sequence[str],
    weights: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every score of `score_names`, (B,) each.

    true, called: (S,) int class indices; probabilities: (S, C), rows sum to 1; weights: (B, S), how often each unit
    counts, once each if not given (B = 1).
    """
    P = np.asarray(probabilities, np.float64)
    W = np.ones((1, len(true))) if weights is None else np.asarray(weights, np.float64)
    labels = np.arange(len(classes))
    is_true, is_called = true[:, None] == labels, called[:, None] == labels
    total = W.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is nan: there is no such unit
        confusion = np.stack([(W * is_true[:, c]) @ is_called for c in labels], axis=1)  # (B, true, called)
        held, given = confusion.sum(2), confusion.sum(1)  # (B, C)
        hit = np.diagonal(confusion, axis1=1, axis2=2)
        f1 = 2 * hit / (held + given)
        sensitivity = hit / held
        specificity = (total[:, None] - held - given + hit) / (total[:, None] - held)
        ranked = [ranking_scores(is_true[:, c], P[:, c], W) for c in (labels if len(labels) > 2 else labels[1:])]
        auroc, auprc = (np.stack(values, axis=1) for values in zip(*ranked, strict=True))
        right = P[np.arange(len(true)), true]
        squares = ((P - is_true) ** 2).sum(1) / (2 if len(labels) == 2 else 1)
        of_class = {"f1": f1, "sensitivity": sensitivity, "specificity": specificity}
        if len(labels) > 2:
            of_class |= {"auroc": auroc, "auprc": auprc}
        values = {
            "accuracy": hit.sum(1) / total,
            "balanced_accuracy": sensitivity.mean(1),
            "macro_f1": f1.mean(1),
            "f1_positive": f1[:, 1] if len(labels) == 2 else np.full(len(W), np.nan),
            "auroc": auroc.mean(1),
            "auprc": auprc.mean(1),
            "sensitivity": sensitivity[:, 1] if len(labels) == 2 else sensitivity.mean(1),
            "specificity": specificity[:, 1] if len(labels) == 2 else specificity.mean(1),
            "brier": W @ squares / total,
            "log_loss": W @ -np.log(right) / total,
            "ece": calibration_error(P.max(1), P.argmax(1) == true, W),
        }
    values |= {f"{kind}[{name}]": of[:, c] for kind, of in of_class.items() for c, name in enumerate(classes)}
    return {name: values[name] for name in score_names(classes)}


def ranking_scores(positive: np.ndarray, ranks: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, (B,) each, with ties as scikit-learn has them; nan without one of the two kinds.

    positive: (S,) bool; ranks: (S,), higher is more positive; weights: (B, S).
    """
    order = np.argsort(-ranks, kind="stable")
    ordered = ranks[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # units of one rank are taken together
    W = weights[:, order]
    ours = np.add.reduceat(W * positive[order], starts, axis=1)
    others = np.add.reduceat(W * ~positive[order], starts, axis=1)
    above, wrong = ours.cumsum(1), others.cumsum(1)
    P, N = above[:, -1], wrong[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (others * (above - ours / 2)).sum(1) / (P * N)
        precision = np.where(ours > 0, above / (above + wrong), 0.0)
        return auroc, np.where(N > 0, (ours * precision).sum(1) / P, np.nan)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ECE, (B,): the mean gap between confidence and accuracy over bins, each by its share of the units.

    confidence: (S,) in 0..1; correct: (S,) bool; weights: (B, S). A confidence on an edge belongs to the lower bin.
    """
    edges = np.linspace(0, 1, ECE_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, ECE_BINS - 1)
    gaps = weights @ ((confidence - correct)[:, None] * (bins[:, None] == np.arange(ECE_BINS)))
    return np.asarray(np.abs(gaps).sum(1) / weights.sum(1))
