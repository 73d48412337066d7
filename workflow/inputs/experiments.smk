"""What datasets and experiments bring to split, train, predict, evaluate and compare."""


def output_folder(wildcards, output):
    return str(Path(output[0]).parent)


def dataset_tables(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return [f"results/{cohort}/features/{dataset.encoder}.csv" for cohort in dataset.cohorts]


def table_options(wildcards):
    tables = zip(CONFIG.datasets[wildcards.dataset].cohorts, dataset_tables(wildcards))
    return [f"--slide-table={cohort}={table}" for cohort, table in tables]


def classes(wildcards):
    return json.dumps(CONFIG.datasets[wildcards.dataset].classes)


def split_settings(wildcards):
    return json.dumps(asdict(CONFIG.datasets[wildcards.dataset].split), sort_keys=True)


def split_file_digest(wildcards):
    """What stands in the user's own file or files of a split: no input, as for slides (`version`)."""
    path = CONFIG.datasets[wildcards.dataset].split.path
    if path is None:
        return ""
    files = sorted(Path(path).glob("splits_*.csv")) if Path(path).is_dir() else [Path(path)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def experiment_of(wildcards):
    dataset, name = wildcards.dataset, wildcards.experiment
    if name in TABLE_EXPERIMENTS:
        try:
            return CONFIG.table_experiment(dataset, TABLE_EXPERIMENTS[name])
        except ConfigError as error:
            raise WorkflowError(str(error))
    if (dataset, name) not in CONFIG.experiments:
        raise WorkflowError(f"config has no experiment {name} on dataset {dataset}")
    return CONFIG.experiments[dataset, name]


def experiment_settings(wildcards):
    return json.dumps(experiment_of(wildcards).as_dict(), sort_keys=True)


def groups_file(cohort, experiment):
    """Groups by features are those of one encoder, all others hold for every encoder."""
    if experiment.grouping.startswith("features-"):
        return f"results/{cohort}/groups/{experiment.encoder}/{experiment.grouping}.npz"
    return f"results/{cohort}/groups/{experiment.grouping}.npz"


def experiment_groups(wildcards):
    experiment = experiment_of(wildcards)
    cohorts = CONFIG.datasets[wildcards.dataset].cohorts if experiment.grouping else []
    return [groups_file(cohort, experiment) for cohort in cohorts]


def group_options(wildcards):
    cohorts = CONFIG.datasets[wildcards.dataset].cohorts
    return [f"--groups={cohort}={file}" for cohort, file in zip(cohorts, experiment_groups(wildcards))]


def model_code(wildcards):
    """Digest of training and of the experiment's own model: another method's code does not count."""
    experiment = experiment_of(wildcards)
    return code_digest("gmmamba.training", *model_modules(experiment.method, experiment.model))


def prediction_code(wildcards):
    experiment = experiment_of(wildcards)
    return code_digest("gmmamba.prediction", *model_modules(experiment.method, experiment.model))


def first_stage(wildcards):
    """What training starts from: nothing, unless the method has two stages."""
    experiment = experiment_of(wildcards)
    if not has_first_stage(experiment.method, experiment.model):
        return []
    folder = "results/{dataset}/{experiment}/fold{fold}_seed{seed}/first_stage"
    return [f"{folder}/{file}" for file in ("model.safetensors", "model.json", "history.csv")]


def first_stage_option(wildcards, input):
    return f"--first-stage {Path(input.first_stage[0]).parent}" if input.first_stage else ""


def model_folder(wildcards, input):
    return str(Path(input.model).parent)


def runs(dataset, experiment, file):
    return expand(
        f"results/{dataset}/{experiment}/fold{{fold}}_seed{{seed}}/{file}",
        fold=CONFIG.datasets[dataset].folds,
        seed=CONFIG.datasets[dataset].seeds,
    )


def experiment_predictions(wildcards):
    return runs(wildcards.dataset, wildcards.experiment, "predictions.csv")


def dataset_experiments(wildcards):
    return [experiment for (dataset, _), experiment in CONFIG.experiments.items() if dataset == wildcards.dataset]


def experiment_names(wildcards):
    return [experiment.name for experiment in dataset_experiments(wildcards)]


def dataset_predictions(wildcards):
    return [file for name in experiment_names(wildcards) for file in runs(wildcards.dataset, name, "predictions.csv")]


def run_options(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return expand("--runs fold{fold}_seed{seed}", fold=dataset.folds, seed=dataset.seeds)


def evaluation_settings(wildcards):
    return json.dumps(CONFIG.datasets[wildcards.dataset].evaluation, sort_keys=True)
