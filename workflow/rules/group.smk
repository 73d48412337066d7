rule group_cohort:
    input:
        cohort_tiles,
    output:
        "results/{cohort}/groups/{grouping}.npz",
    log:
        "results/{cohort}/logs/group/{grouping}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        sheet=sheet_file,
        tiles="results/{cohort}/tiles",
        code=code_digest("gmmamba.grouping"),
    shell:
        "python -m gmmamba group --cohort {wildcards.cohort} --sheet={params.sheet:q} --tiles {params.tiles}"
        " --grouping {wildcards.grouping} --output {output} > {log} 2>&1"


rule group_cohort_by_features:
    input:
        cohort_stores,
    output:
        "results/{cohort}/groups/{encoder}/features-{groups}.npz",
    log:
        "results/{cohort}/logs/group/{encoder}/features-{groups}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(120),
    params:
        sheet=sheet_file,
        stores="results/{cohort}/features/{encoder}",
        code=code_digest("gmmamba.grouping"),
    shell:
        "python -m gmmamba group-by-features --cohort {wildcards.cohort} --sheet={params.sheet:q}"
        " --stores {params.stores} --encoder {wildcards.encoder} --groups {wildcards.groups}"
        " --output {output} > {log} 2>&1"
