"""What predictions on new slides need: the models of an experiment, and the stores of the slides."""


def model_files(dataset, experiment):
    return [file for name in ("model.safetensors", "model.json") for file in runs(dataset, experiment, name)]


def run_folders(dataset, experiment):
    return [str(Path(file).parent) for file in runs(dataset, experiment, "model.json")]


def trained_models(wildcards):
    return model_files(wildcards.dataset, wildcards.experiment)


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
    pipeline = f"results/{new.dataset}/{new.experiment}/pipeline.json"
    return [pipeline, *model_files(new.dataset, new.experiment)]


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
