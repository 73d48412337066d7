"""docs/adding_a_model.md says what is enough: its code, its line and its defaults make a method of the pipeline."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from gmmamba import models
from gmmamba.config import DEFAULT_SCHEMA, load_config
from gmmamba.models.bag import Bag
from gmmamba.prediction import predict
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import train
from tests.gmmamba.synthetic import CLASSES, experiment, make_dataset

ROOT = Path(__file__).parents[2]


def test_the_page_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/adding_a_model.md").read_text()
    code, line, schema, named = re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)
    ((method, place),) = re.findall(r'"(\w+)": "([\w.:]+)",', line)
    module_name, _, class_name = place.partition(":")
    (tmp_path / "module.py").write_text(code)
    spec = importlib.util.spec_from_file_location(module_name, tmp_path / "module.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setitem(models.MODELS, method, place)

    # The configuration knows it, with the constructor's defaults.
    whole = yaml.safe_load(DEFAULT_SCHEMA.read_text())
    whole["$defs"]["methods"] |= yaml.safe_load(schema)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(whole))
    default = inspect.signature(getattr(module, class_name)).parameters["k"].default
    assert whole["$defs"]["methods"][method]["properties"]["k"]["default"] == default
    rows = [f"S{i},P{i},{('normal', 'tumour')[i % 2]},s{i}.svs" for i in range(20)]
    for i in range(20):
        (tmp_path / f"s{i}.svs").touch()
    (tmp_path / "slides.csv").write_text("\n".join(["slide_id,patient_id,label,path", *rows]))
    config = yaml.safe_load((ROOT / "config.yaml").read_text()) | yaml.safe_load(named)
    config["cohorts"]["demo"]["sheet"] = str(tmp_path / "slides.csv")
    resolved = load_config(config, tmp_path / "schema.yaml").experiments["demo", "top-20"]
    assert (resolved.method, resolved.model) == (method, {"k": 20})

    # It computes what it says, learns, and predicts.
    model = models.create_model(method, 16, 2, k=3)
    for N in (1, 2, 40):
        output = model(Bag(torch.randn(N, 16), torch.zeros(N, 2)))
        assert output.attention is not None
        assert (output.attention > 0).sum() == min(N, 3)
        assert output.attention.sum() == pytest.approx(1)
    tables, _ = make_dataset(tmp_path)
    split_dataset(tables, CLASSES, SplitSettings(folds=3), tmp_path / "splits.csv")
    train(experiment(method, epochs=8), 0, 0, tmp_path / "splits.csv", tables, None, tmp_path / "run", threads=1)
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    predict(tmp_path / "run", 0, 0, tmp_path / "splits.csv", tables, None, tmp_path / "p.csv", tmp_path / "a.npz")
    assert len(pd.read_csv(tmp_path / "p.csv"))
