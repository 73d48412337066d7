"""What the report of a dataset is drawn from."""


def report_inputs(wildcards):
    """Everything the report draws: metrics, predictions, attention and history of each run, and the groups."""
    dataset = CONFIG.datasets[wildcards.dataset]
    files = [f"results/{dataset.name}/comparisons.csv"]
    for experiment in dataset_experiments(wildcards):
        files += [f"results/{dataset.name}/{experiment.name}/{file}" for file in ("metrics.csv", "pooled.csv")]
        for file in ("predictions.csv", "attention.npz", "history.csv", "model.json"):
            files += runs(dataset.name, experiment.name, file)
    return files


def report_groups(wildcards):
    cohorts = CONFIG.datasets[wildcards.dataset].cohorts
    used = [experiment for experiment in dataset_experiments(wildcards) if experiment.grouping]
    return sorted({groups_file(cohort, experiment) for cohort in cohorts for experiment in used})


def report_group_options(wildcards):
    return [f"--groups={Path(file).parts[1]}/{Path(file).stem}={file}" for file in report_groups(wildcards)]


def report_encoder(dataset):
    """What the report says of a dataset's encoder, and which cohorts' features were imported."""
    cohorts = [CONFIG.cohorts[cohort] for cohort in dataset.cohorts]
    imported = {cohort.name: cohort.features[dataset.encoder] for cohort in cohorts if cohort.features}
    described = {"name": dataset.encoder, **CONFIG.encoders.get(dataset.encoder, {})}
    return described | ({"imported": imported} if imported else {})


def costs_version(wildcards):
    costs = CONFIG.report["costs"]
    return "" if costs is None else version(costs)


def report_settings(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return json.dumps(
        {
            "dataset": dataset.name,
            "experiments": [e.as_dict() for e in dataset_experiments(wildcards)],
            "folds": dataset.folds,
            "seeds": dataset.seeds,
            "classes": dataset.classes,
            "encoder": report_encoder(dataset),
            "sheets": {name: str(CONFIG.cohorts[name].sheet) for name in dataset.cohorts},
            "evaluation": dataset.evaluation,
            "notes": CONFIG.warnings[dataset.name],
            "settings": CONFIG.report,
            "config": {
                "tiling": {name: CONFIG.cohorts[name].tiling for name in dataset.cohorts if name in TILED},
                "split": json.loads(split_settings(wildcards)),
            },
        },
        sort_keys=True,
    )
