"""What the rules share: the checked configuration, the shell of every job, wildcards held to known values, targets."""

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

sys.path.insert(0, workflow.basedir)

from gmmamba.config import ConfigError, load_config
from gmmamba.config_checks import read_yaml
from gmmamba.fingerprint import ROOT, code_digest, file_digest
from gmmamba.models import has_first_stage, model_modules
from gmmamba.project import where_to_look
from gmmamba.table_rows import experiment_name
from slidestore.settings import own_function
from slidestore.warm_start import OWNER

try:
    for file in workflow.configfiles if workflow.is_main_process else ():
        read_yaml(Path(file))  # Snakemake takes the later of two equal keys
    CONFIG = load_config(config)
except ConfigError as error:
    raise WorkflowError(str(error))

if workflow.is_main_process:  # once, and not in the log of every job
    for warning in CONFIG.warning_lines():
        print(f"Warning: {warning}", file=sys.stderr)


TABLE_EXPERIMENTS = CONFIG.table_experiments()  # their rows, by name


def environment():
    """Shell code before every job: the packages beside this workflow, whose warm processes jobs fork from, and without
    conda the Python that runs Snakemake."""
    methods = workflow.deployment_settings.deployment_method
    if methods and not Path(workflow.basedir, "gmmamba").is_dir():  # installed: ROOT has all packages of this Python
        raise WorkflowError(
            "conda and containers give jobs another Python, which takes gmmamba from a checkout: clone the repository "
            "and run snakemake there, or leave --use-conda (--sdm) out"
        )
    lines = [f'export PYTHONPATH="{ROOT}"']
    # Set but empty: every job by itself. In a container, too: its files may go away with the job that started it.
    if OWNER not in os.environ and DeploymentMethod.APPTAINER not in methods:
        lines.append(f"export {OWNER}={os.getpid()}")
    if not methods:
        lines.append(f'export PATH="{Path(sys.executable).parent}:$PATH"')
    return "set -euo pipefail; " + "; ".join(lines) + "; "


shell.prefix(environment())

HAS_GPU = shutil.which("nvidia-smi") is not None
ONE_MACHINE = workflow.is_main_process and workflow.resource_settings.nodes is None

if ONE_MACHINE and HAS_GPU and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", 1)  # jobs take turns; with --resources gpu=N, N share it
elif ONE_MACHINE and not HAS_GPU and "gpu" in workflow.global_resources:
    workflow.register_resource("gpu", workflow.cores)  # there is none to take turns at


def growing(amount):
    """A resource that a job asks for `amount` of, and for more each time that it is tried again (`retries`)."""

    def of_attempt(wildcards, attempt):
        return amount * attempt

    return of_attempt


def one_of(names):
    return "|".join(sorted(map(re.escape, names))) or "(?!)"


COHORTS = CONFIG.cohorts | {name: new.cohort for name, new in CONFIG.predictions.items()}
IMPORTED = [cohort.name for cohort in CONFIG.cohorts.values() if cohort.features]
TILED = [cohort for cohort in COHORTS if cohort not in IMPORTED]


wildcard_constraints:
    cohort=one_of(COHORTS),
    encoder=one_of(CONFIG.encoder_names()),
    grouping=r"(location|random|sequential)-\d+",
    groups=r"\d+",
    dataset=one_of(CONFIG.datasets),
    experiment=one_of({experiment for _, experiment in CONFIG.experiments} | set(TABLE_EXPERIMENTS)),
    table=one_of(CONFIG.tables),
    prediction=one_of(CONFIG.predictions),
    slide=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    fold=r"\d+",
    seed=r"\d+",


# Targets ---------------------------------------------------------------------------------------------------------


def slide_tables():
    return [
        f"results/{cohort.name}/features/{encoder}.csv"
        for cohort in CONFIG.cohorts.values()
        for encoder in cohort.encoders
    ]


def contact_sheets():
    return [f"results/{cohort}/contact_sheet.html" for cohort in TILED if cohort in CONFIG.cohorts]


def group_files():
    """The groups of every cohort that has the encoder of some experiment with groups."""
    return sorted(
        {
            groups_file(cohort.name, experiment)
            for cohort in CONFIG.cohorts.values()
            for experiment in CONFIG.experiments.values()
            if experiment.grouping and experiment.encoder in cohort.encoders
        }
    )


def pipelines():
    return [f"results/{dataset}/{experiment}/pipeline.json" for dataset, experiment in CONFIG.experiments]


def predictions():
    return [f"results/{name}/{file}" for name in CONFIG.predictions for file in ("predictions.csv", ".patches")]


def last_lines():
    """The pages that a run leaves, and how to see the slides: the last lines of a good one."""
    command = Path(sys.executable).with_name("gmmamba")
    if not command.exists():
        command = "gmmamba"
    elif command.is_relative_to(Path.cwd()):
        command = command.relative_to(Path.cwd())
    sheets, pages = ([page for page in map(Path, files) if page.is_file()] for files in (contact_sheets(), reports()))
    lines = where_to_look(sheets, pages, command)
    lines += [f"Predictions: results/{name}" for name in CONFIG.predictions if Path("results", name).is_dir()]
    return "\n".join(lines)


def reports():
    return [f"results/{dataset}/report.html" for dataset in sorted({d for d, _ in CONFIG.experiments})]
