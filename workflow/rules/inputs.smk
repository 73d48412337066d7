"""Inputs and params of the rules, by name."""

# Cohorts ---------------------------------------------------------------------------------------------------------


def slide_row(wildcards):
    slides = COHORTS[wildcards.cohort].slides
    if wildcards.slide not in slides:
        raise WorkflowError(f"slide {wildcards.slide} is not in {COHORTS[wildcards.cohort].sheet}")
    return slides[wildcards.slide]


def slide_file(wildcards):
    return str(slide_row(wildcards).path)


def version(path):
    """Tells a file from its replacement. What users bring is no `input` of a rule: it may be dated in the future, by a
    scanner's clock or a server's, and would then be newer than whatever was made of it."""
    status = Path(path).stat()
    return f"{status.st_size}-{int(status.st_mtime)}"  # archives keep no more than seconds


def slide_version(wildcards):
    return version(slide_file(wildcards))


def mpp_option(wildcards):
    row = slide_row(wildcards)
    return "" if row.mpp is None else f"--mpp {row.mpp!r} --mpp-source {row.mpp_source}"


def mask_option(wildcards):
    mask = slide_row(wildcards).mask
    return [] if mask is None else [f"--tissue-mask={mask}"]


def mask_version(wildcards):
    mask = slide_row(wildcards).mask
    return "" if mask is None else version(mask)


def tiling_settings(wildcards):
    return json.dumps(COHORTS[wildcards.cohort].tiling_of(slide_row(wildcards)), sort_keys=True)


def encoder_settings(wildcards):
    return json.dumps(
        {"name": wildcards.encoder, **CONFIG.encoders[wildcards.encoder]},
        sort_keys=True,
    )


def reading_settings(wildcards):
    """Not the number of threads: the pixels are the same."""
    return json.dumps({name: value for name, value in CONFIG.reading.items() if name != "threads"}, sort_keys=True)


def weights_version(wildcards):
    """Of the files that an encoder is made of, where it is of any: another file of that name is another encoder."""
    encoder = CONFIG.encoders[wildcards.encoder]
    weights = encoder["weights"]
    found = weights if weights in ("pretrained", "random") else version(weights)
    own = own_function(encoder["model"])
    return f"{found} {file_digest(own[0])}" if own else found


def foreign_files(wildcards):
    """Of the encoder, or, for the patches, which all encoders share, of the cohort's first."""
    cohort = CONFIG.cohorts[wildcards.cohort]
    slide_row(wildcards)
    return cohort.foreign_files(wildcards.get("encoder", next(iter(cohort.features))), wildcards.slide)


def foreign_options(wildcards):
    files = foreign_files(wildcards)
    options = [f"--format={files.format}", f"--features={files.path}"]
    return options + ([f"--patches={files.patches}"] if files.patches else [])


def foreign_version(wildcards):
    files = foreign_files(wildcards)
    return [version(path) for path in (files.path, files.patches) if path]


def foreign_weights(wildcards):
    sha = CONFIG.cohorts[wildcards.cohort].features[wildcards.encoder]["weights_sha256"]
    return f"--weights-sha256={sha}" if sha else ""


def slide_version_if_there(wildcards):
    return slide_version(wildcards) if Path(slide_file(wildcards)).exists() else "not there"


def sheet_file(wildcards):
    return str(CONFIG.cohorts[wildcards.cohort].sheet)


def sheet_digest(wildcards):
    return hashlib.sha256(Path(sheet_file(wildcards)).read_bytes()).hexdigest()[:12]


def kept_slides(wildcards):
    return [slide.slide_id for slide in CONFIG.cohorts[wildcards.cohort].slides.values() if not slide.exclude]


def cohort_tiles(wildcards):
    return expand(
        "results/{cohort}/tiles/{slide}.npy",
        cohort=wildcards.cohort,
        slide=kept_slides(wildcards),
    )


def cohort_pictures(wildcards):
    return expand(
        "results/{cohort}/tiles/{slide}.{file}",
        cohort=wildcards.cohort,
        slide=kept_slides(wildcards),
        file=("json", "thumbnail.jpg", "geojson"),
    )


def cohort_stores(wildcards):
    return expand(
        "results/{cohort}/features/{encoder}/{slide}.zarr.zip",
        cohort=wildcards.cohort,
        encoder=wildcards.encoder,
        slide=kept_slides(wildcards),
    )


# Datasets and experiments ----------------------------------------------------------------------------------------


def dataset_tables(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return [f"results/{cohort}/features/{dataset.encoder}.csv" for cohort in dataset.cohorts]


def table_options(wildcards):
    tables = zip(CONFIG.datasets[wildcards.dataset].cohorts, dataset_tables(wildcards))
    return [f"--slide-table={cohort}={table}" for cohort, table in tables]


def classes(wildcards):
    return json.dumps(CONFIG.datasets[wildcards.dataset].classes)


def split_settings(wildcards):
    from dataclasses import asdict

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


def output_folder(wildcards, output):
    return str(Path(output[0]).parent)


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


# Predictions on new slides ---------------------------------------------------------------------------------------


def run_folders(dataset, experiment):
    return [str(Path(file).parent) for file in runs(dataset, experiment, "model.json")]


def trained_models(wildcards):
    return [
        file
        for name in ("model.safetensors", "model.json")
        for file in runs(wildcards.dataset, wildcards.experiment, name)
    ]


def trained_folders(wildcards):
    return run_folders(wildcards.dataset, wildcards.experiment)


def pipeline_settings(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    encoder = CONFIG.encoders.get(dataset.encoder)
    settings = {
        "tiling": {name: CONFIG.cohorts[name].tiling for name in dataset.cohorts if name in TILED},
        "reading": json.loads(reading_settings(wildcards)),
        "encoder": encoder and {"name": dataset.encoder, **encoder},
    }
    return json.dumps(settings, sort_keys=True)


def new_slides(wildcards):
    return CONFIG.predictions[wildcards.prediction]


def ensemble_files(wildcards):
    new = new_slides(wildcards)
    files = ("model.safetensors", "model.json")
    pipeline = f"results/{new.dataset}/{new.experiment}/pipeline.json"
    return [pipeline, *(file for name in files for file in runs(new.dataset, new.experiment, name))]


def new_stores(wildcards):
    new = new_slides(wildcards)
    return expand(
        "results/{cohort}/features/{encoder}/{slide}.zarr.zip",
        cohort=wildcards.prediction,
        encoder=new.cohort.encoders,
        slide=new.cohort.slides,
    )


def new_slides_options(wildcards):
    new = new_slides(wildcards)
    runs = [word for folder in run_folders(new.dataset, new.experiment) for word in ("--runs", Path(folder).name)]
    mpp = [] if new.mpp is None else ["--mpp", repr(new.mpp)]
    return [f"results/{new.dataset}/{new.experiment}", str(new.source), *runs, "--like", new.like, *mpp]


def new_slides_code(wildcards):
    new = new_slides(wildcards)
    experiment = CONFIG.experiments[new.dataset, new.experiment]
    return code_digest("gmmamba.inference.command", *model_modules(experiment.method, experiment.model))


def new_slides_rows(wildcards):
    """What a sheet says beside how its slides are read: their labels."""
    return [[slide.slide_id, slide.label] for slide in new_slides(wildcards).cohort.slides.values()]


# Tables ----------------------------------------------------------------------------------------------------------


def table_runs(wildcards):
    """The metrics of each row, and the predictions that they are from."""
    rows = [experiment_name(row, CONFIG.table_protocol) for row in CONFIG.tables[wildcards.table].rows]
    return [file for name in rows for file in (
        f"results/{wildcards.dataset}/{name}/metrics.csv", *runs(wildcards.dataset, name, "predictions.csv")
    )]  # fmt: skip


def table_settings(wildcards):
    from dataclasses import asdict

    dataset = CONFIG.datasets[wildcards.dataset]
    return json.dumps(
        {
            "table": asdict(CONFIG.tables[wildcards.table]),
            "protocol": CONFIG.table_protocol,
            "dataset": dataset.name,
            "classes": dataset.classes,
            "folds": dataset.folds,
            "seeds": dataset.seeds,
        }
    )  # rows in their order: keys are not sorted


def table_files(table):
    return expand(
        "results/{dataset}/tables/{table}.{form}",
        dataset=CONFIG.table_datasets[table],
        table=table,
        form=["csv", "md", "tex"],
    )
