rule tile_slide:
    output:
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
        thumbnail="results/{cohort}/tiles/{slide}.thumbnail.jpg",
        mask="results/{cohort}/tiles/{slide}.mask.png",
    log:
        "results/{cohort}/logs/tile/{slide}.log",
    wildcard_constraints:
        cohort=one_of(TILED),
    conda:
        "../../envs/preprocessing.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(15),
    params:
        slide=slide_file,
        version=slide_version,
        settings=tiling_settings,
        mpp=mpp_option,
        code=code_digest("preprocessing.tile"),
    shell:
        "python -m preprocessing tile --slide={params.slide:q} --slide-id {wildcards.slide} --cohort {wildcards.cohort}"
        " --settings {params.settings:q} {params.mpp} --coords {output.coords} --record {output.record}"
        " --thumbnail {output.thumbnail} --mask {output.mask} > {log} 2>&1"
