"""What one slide, or one cohort, brings to the stages before any dataset: tile, import, encode, account, group."""


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


def slide_version_if_there(wildcards):
    return slide_version(wildcards) if Path(slide_file(wildcards)).exists() else "not there"


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
