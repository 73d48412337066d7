"""The models of config/models.yaml: they run, and have the parts that the paper's tables say."""

import dataclasses
from typing import Any

import pytest
import torch

from gmmamba.config import Experiment, load_config
from gmmamba.models import create_model
from gmmamba.models.bag import Bag, MILOutput
from gmmamba.models.css import VARIANTS
from gmmamba.models.gmmamba import PUBLISHED
from gmmamba.models.imm import MASKS
from tests.gmmamba.configs import named_models

NAMED = list(named_models())
ABLATION = {  # of the poster: groups (LG), BiMamba 2 and pooling by attention (IMM), its mask, CSS
    "with-bmp": (None, False, False, False),
    "with-lg-bmp": ("location-10", False, False, False),
    "without-masking": ("location-10", True, False, False),
    "with-imm": ("location-10", True, True, False),
    "with-css": ("location-10", True, False, True),
    "published": ("location-10", True, True, True),
}


@pytest.fixture
def named(config: dict[str, Any]) -> dict[str, Experiment]:
    """Every model of config/models.yaml, as training would be given it."""
    config["experiments"] = {name: {"model": name, "dataset": "demo"} for name in NAMED}
    return {name: experiment for (_, name), experiment in load_config(config).experiments.items()}


def run(experiment: Experiment) -> MILOutput:
    """A narrow twin of the experiment's model on a bag of four groups."""
    torch.manual_seed(0)
    narrow = {"width": 32} if "width" in experiment.model else {}
    model = create_model(experiment.method, 24, 2, **(experiment.model | narrow))
    bag = Bag(torch.randn(40, 24), torch.zeros(40, 2, dtype=torch.int32), torch.arange(40) % 4)
    output: MILOutput = model.eval()(bag)
    return output


@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_runs(named: dict[str, Experiment], name: str) -> None:
    output = run(named[name])
    assert output.logits.shape == (1, 2)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("name", ABLATION)
def test_ablation_rows_have_what_the_table_says(named: dict[str, Experiment], name: str) -> None:
    details = run(named[name]).details
    parts = ("h2" in details, "mask_scores" in details, "super_features" in details)
    assert (named[name].grouping, *parts) == ABLATION[name]
    assert details["keep"].all() == ("mask_scores" not in details)


def test_every_row_of_the_papers_tables_is_a_named_model(named: dict[str, Experiment]) -> None:
    ours = [experiment for experiment in named.values() if experiment.method == "gmmamba"]
    assert {e.model["css"] for e in ours} >= {*VARIANTS, None}
    assert {e.model["mask_ratio"] for e in ours} >= {0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3}
    assert {e.model["init"] for e in ours} >= {"published", "mamba"}
    assert {e.grouping for e in ours} >= {
        "location-2", "location-5", "location-10", "location-20", "random-10", "sequential-10", "features-10",
    }  # fmt: skip
    assert {e.model["mask"] for e in ours} == {None, *MASKS}
    assert named["published"].model.items() >= PUBLISHED.items()
    different = {str(dataclasses.replace(experiment, name="")) for experiment in named.values()}
    assert len(different) == len(named)  # no two names for one model
