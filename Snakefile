# Slides to report. Settings: config.yaml in the working directory, or the file given with --configfile.
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

min_version("9.9")

if not workflow.configfiles:

    configfile: "config.yaml"


if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:

    # The image that holds the environments of envs/ (docs/environments.md). Without it, folders may have spaces.
    containerized: f"{workflow.basedir}/envs/gmmamba.sif"


include: "workflow/rules/common.smk"
include: "workflow/inputs/slides.smk"
include: "workflow/inputs/experiments.smk"
include: "workflow/inputs/report.smk"
include: "workflow/inputs/predict.smk"
include: "workflow/inputs/tables.smk"
include: "workflow/rules/tile.smk"
include: "workflow/rules/encode.smk"
include: "workflow/rules/import.smk"
include: "workflow/rules/group.smk"
include: "workflow/rules/split.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/predict.smk"


rule all:
    default_target: True
    input:
        contact_sheets(),
        slide_tables(),
        group_files(),
        reports(),
        pipelines(),
        predictions(),
    localrule: True


onstart:
    if ONE_MACHINE and not HAS_GPU:
        print("No GPU on this machine: encoding, training and prediction run on the CPU.", file=sys.stderr)


onsuccess:
    print(last_lines(), file=sys.stderr)


onerror:
    print(
        "Each job that failed stands here with its log; what did not depend on it is done. Mend it, and give the"
        " same command again: it goes on from there (docs/reliability.md).",
        file=sys.stderr,
    )
