"""How good predicted probabilities are: the numbers of metrics.csv, of history.csv and of the report.

S slides, C classes. In a two-class task the second class is the positive one. A metric that the slides at hand
leave undefined is nan, never a made-up 0.5.
"""

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score, roc_auc_score

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "f1_positive", "auroc", "auprc")


def classification_metrics(true: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS, each in 0..1 or nan.

    true: (S,) int class indices; probabilities: (S, C), rows sum to 1. The predicted class is the most probable
    one, which is the threshold 0.5 for two classes. AUROC and AUPRC of more than two classes are the macro means
    of one class versus the rest; f1_positive is nan there.
    """
    true = np.asarray(true)
    n_classes = probabilities.shape[1]
    labels = np.arange(n_classes)
    predicted = probabilities.argmax(axis=1)
    present = len(np.unique(true)) == n_classes
    f1 = f1_score(true, predicted, labels=labels, average=None, zero_division=np.nan)
    auroc = auprc = balanced_accuracy = np.nan
    if present:  # else a class has no recall, and no slide to be ranked above the others
        balanced_accuracy = recall_score(true, predicted, labels=labels, average="macro")
        if n_classes == 2:
            auroc = roc_auc_score(true, probabilities[:, 1])
            auprc = average_precision_score(true, probabilities[:, 1])
        else:
            one_hot = true[:, None] == labels
            auroc = roc_auc_score(one_hot, probabilities, average="macro")
            auprc = average_precision_score(one_hot, probabilities, average="macro")
    values = {
        "accuracy": accuracy_score(true, predicted),
        "balanced_accuracy": balanced_accuracy,
        "macro_f1": np.mean(f1),
        "f1_positive": f1[1] if n_classes == 2 else np.nan,
        "auroc": auroc,
        "auprc": auprc,
    }
    return {name: float(values[name]) for name in METRICS}


def selection_score(metrics: dict[str, float], n_classes: int) -> float:
    """What the kept epoch maximises on the validation slides: F1 + AUROC, as the published code does."""
    return metrics["auroc"] + metrics["f1_positive" if n_classes == 2 else "macro_f1"]
