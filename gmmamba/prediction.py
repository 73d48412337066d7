"""predict: the probabilities and the attention of a trained model on the validation and test slides of its fold.

Reads a run's model.safetensors and model.json, splits.csv, stores and groups. Writes predictions.csv (`slide_id,
patient_id, cohort, fold, seed, part, true, predicted`, prob_<class> a class) and attention.npz, which holds for
every test slide, under its slide_id, the (N,) float32 attention of its patches in the order of its store (nothing
for models without attention). Attention and probabilities come from the same forward pass.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from gmmamba.data import BagReader, DataError, LabelledBag, encoder_weights, load_bags
from gmmamba.models import create_model
from gmmamba.models.bag import MILModel
from slidestore.atomic import replace_when_whole


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_repeatable(seed: int, threads: int) -> None:
    """Seed torch and let it use only operations that give the same bits each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # needless: all is written
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def load_model(folder: Path) -> tuple[MILModel, dict[str, Any]]:
    """The trained model of a run's folder, on the CPU and in evaluation mode, and its model.json."""
    card = json.loads((folder / "model.json").read_text())
    experiment = card["experiment"]
    model = create_model(experiment["method"], card["in_dim"], len(card["classes"]), **experiment["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), card


@torch.no_grad()
def predict_bags(
    model: MILModel, slides: Sequence[LabelledBag], reader: BagReader
) -> tuple[Tensor, list[Tensor | None]]:
    """The logits (S, C) float32 on the CPU, and the attention (N,) of each slide, on the model's device."""
    model.eval()
    logits, attentions = [], []
    for _, bag in reader.stream(slides):
        output = model(bag)
        logits.append(output.logits.float())
        attentions.append(output.attention)
    return torch.cat(logits).cpu(), attentions


def predict(
    model_dir: Path,
    fold: int,
    seed: int,
    splits: Path,
    slide_tables: Mapping[str, Path],
    groups: Mapping[str, Path] | None,
    predictions: Path,
    attention: Path,
    threads: int = 1,
) -> None:
    """Predict the validation and test slides of the run in `model_dir`; see the module for what is written.

    Raises DataError where the model was trained for another fold or seed, on other classes or on features of other
    encoder weights; StoreError for stores of another encoder.
    """
    model, card = load_model(model_dir)
    check_run(card, fold, seed, model_dir)
    classes, encoder = card["classes"], card["encoder"]
    make_repeatable(seed, threads)
    device = choose_device()
    model.to(device)

    tables, maps = [], {}
    for part in ("val", "test"):
        bags = load_bags(splits, fold, part, slide_tables, groups, encoder, classes)
        check_belongs(card, bags, model_dir)
        logits, attentions = predict_bags(model, bags, BagReader(device, budget=0))
        tables.append(_table(bags, logits, classes).assign(fold=fold, seed=seed, part=part))
        if part == "test":
            maps = {
                item.slide_id: weights.float().cpu().numpy()
                for item, weights in zip(bags, attentions, strict=True)
                if weights is not None
            }
    columns = ["slide_id", "patient_id", "cohort", "fold", "seed", "part", "true", "predicted"]
    table = pd.concat(tables)[columns + [f"prob_{name}" for name in classes]]
    with replace_when_whole(attention) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **maps)  # type: ignore[arg-type]
    with replace_when_whole(predictions) as unfinished:
        table.to_csv(unfinished, index=False)


def check_run(card: Mapping[str, Any], fold: int, seed: int, model_dir: Path) -> None:
    """Raise DataError unless the model is that of this fold and seed."""
    if (card["fold"], card["seed"]) != (fold, seed):
        raise DataError(f"{model_dir} holds fold {card['fold']}, seed {card['seed']}, not fold {fold}, seed {seed}")


def check_belongs(card: Mapping[str, Any], bags: Sequence[LabelledBag], model_dir: Path) -> None:
    """Raise DataError unless the bags have the classes and the encoder weights that the model was trained with."""
    held = {item.label for item in bags}
    for index, name in enumerate(card["classes"]):
        if index not in held:
            raise DataError(f"{model_dir} was trained to know {name!r}, which no slide of the part is: train it anew")
    weights = encoder_weights(bags)
    if weights != card["encoder_weights_sha256"]:
        raise DataError(
            f"{model_dir} was trained on features of {card['encoder']} with weights "
            f"{card['encoder_weights_sha256'][:12]}, the stores have {weights[:12]}: train it anew"
        )


def _table(bags: Sequence[LabelledBag], logits: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    # In float64 a confident float32 logit does not saturate at 1, so slides keep their rank.
    probabilities = logits.double().softmax(dim=1).numpy()
    table = pd.DataFrame(
        {
            "slide_id": [item.slide_id for item in bags],
            "patient_id": [item.patient_id for item in bags],
            "cohort": [item.cohort for item in bags],
            "true": [classes[item.label] for item in bags],
            "predicted": [classes[index] for index in probabilities.argmax(axis=1)],
        }
    )
    for index, name in enumerate(classes):
        table[f"prob_{name}"] = probabilities[:, index]
    return table
