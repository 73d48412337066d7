rule import_tiles:
    output:
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
        thumbnail="results/{cohort}/tiles/{slide}.thumbnail.jpg",
        mask="results/{cohort}/tiles/{slide}.mask.png",
    log:
        "results/{cohort}/logs/tile/{slide}.log",
    wildcard_constraints:
        cohort=one_of(IMPORTED),
    conda:
        "../../envs/preprocessing.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(15),
    params:
        slide=slide_file,
        version=slide_version_if_there,
        files=foreign_options,
        files_version=foreign_version,
        mpp=mpp_option,
        code=code_digest("preprocessing.imported"),
    shell:
        "python -m preprocessing import-tiles --slide={params.slide:q} --slide-id {wildcards.slide}"
        " --cohort {wildcards.cohort} {params.files:q} {params.mpp} --coords {output.coords} --record {output.record}"
        " --thumbnail {output.thumbnail} --mask {output.mask} > {log} 2>&1"


rule import_features:
    input:
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
    output:
        "results/{cohort}/features/{encoder}/{slide}.zarr.zip",
    log:
        "results/{cohort}/logs/encode/{encoder}/{slide}.log",
    wildcard_constraints:
        cohort=one_of(IMPORTED),
    conda:
        "../../envs/preprocessing.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(15),
    params:
        files=foreign_options,
        files_version=foreign_version,
        weights=foreign_weights,
        code=code_digest("preprocessing.imported"),
    shell:
        "python -m preprocessing import-features {params.files:q} --coords {input.coords} --record {input.record}"
        " --encoder {wildcards.encoder} {params.weights} --output {output} > {log} 2>&1"
