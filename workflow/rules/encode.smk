rule encode_slide:
    input:
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
    output:
        "results/{cohort}/features/{encoder}/{slide}.zarr.zip",
    log:
        "results/{cohort}/logs/encode/{encoder}/{slide}.log",
    wildcard_constraints:
        cohort=one_of(TILED),
    conda:
        "../../envs/preprocessing.yaml"
    threads: CONFIG.reading.get("threads", 8 if ONE_MACHINE and HAS_GPU else 1)
    resources:
        mem_mb=growing(4000),
        runtime=growing(120),
        gpu=1,
    params:
        slide=slide_file,
        settings=encoder_settings,
        reading=reading_settings,
        weights=weights_version,
        code=code_digest("preprocessing.encode"),
    shell:
        "python -m preprocessing encode --slide={params.slide:q} --coords {input.coords} --record {input.record}"
        " --settings {params.settings:q} --reading {params.reading:q} --threads {threads} --output {output}"
        " > {log} 2>&1"


rule account_cohort:
    input:
        cohort_stores,
    output:
        "results/{cohort}/features/{encoder}.csv",
    log:
        "results/{cohort}/logs/account/{encoder}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        sheet=sheet_file,
        content=sheet_digest,
        tiles="results/{cohort}/tiles",
        stores="results/{cohort}/features/{encoder}",
        max_failed_share=CONFIG.max_failed_share,
        code=code_digest("gmmamba.accounting"),
    shell:
        "python -m gmmamba account --cohort {wildcards.cohort} --sheet={params.sheet:q} --tiles {params.tiles}"
        " --stores {params.stores} --encoder {wildcards.encoder} --max-failed-share {params.max_failed_share}"
        " --output {output} > {log} 2>&1"
