rule encode_slide:
    input:
        slide=slide_file,
        coords="results/{cohort}/tiles/{slide}.npy",
        record="results/{cohort}/tiles/{slide}.json",
        weights=encoder_weights,
    output:
        "results/{cohort}/features/{encoder}/{slide}.zarr.zip",
    log:
        "results/{cohort}/logs/encode/{encoder}/{slide}.log",
    conda:
        "../../envs/preprocessing.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        gpu=1,
    params:
        settings=encoder_settings,
        code=code_digest("preprocessing.encode"),
    shell:
        "python -m preprocessing encode --slide {input.slide:q} --coords {input.coords} --record {input.record}"
        " --settings {params.settings:q} --threads {threads} --output {output} > {log} 2>&1"


rule account_cohort:
    input:
        sheet=sheet_file,
        stores=cohort_stores,
    output:
        "results/{cohort}/features/{encoder}.csv",
    log:
        "results/{cohort}/logs/account/{encoder}.log",
    conda:
        "../../envs/gmmamba.yaml"
    params:
        tiles="results/{cohort}/tiles",
        stores="results/{cohort}/features/{encoder}",
        max_failed_share=CONFIG.max_failed_share,
        code=code_digest("gmmamba.accounting"),
    shell:
        "python -m gmmamba account --cohort {wildcards.cohort} --sheet {input.sheet:q} --tiles {params.tiles}"
        " --stores {params.stores} --encoder {wildcards.encoder} --max-failed-share {params.max_failed_share}"
        " --output {output} > {log} 2>&1"
