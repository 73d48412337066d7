rule group_cohort:
    input:
        sheet=sheet_file,
        coords=cohort_tiles,
    output:
        "results/{cohort}/groups/{grouping}.npz",
    log:
        "results/{cohort}/logs/group/{grouping}.log",
    conda:
        "../../envs/gmmamba.yaml"
    params:
        tiles="results/{cohort}/tiles",
        code=code_digest("gmmamba.grouping"),
    shell:
        "python -m gmmamba group --cohort {wildcards.cohort} --sheet {input.sheet:q} --tiles {params.tiles}"
        " --grouping {wildcards.grouping} --output {output} > {log} 2>&1"
