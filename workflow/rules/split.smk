rule split_dataset:
    input:
        dataset_tables,
    output:
        "results/{dataset}/splits.csv",
    log:
        "results/{dataset}/logs/split.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(15),
    params:
        tables=table_options,
        classes=classes,
        settings=split_settings,
        file=split_file_digest,
        code=code_digest("gmmamba.splits", "gmmamba.leakage"),
    shell:
        "python -m gmmamba split --dataset {wildcards.dataset} --classes {params.classes:q} {params.tables}"
        " --settings {params.settings:q} --output {output} > {log} 2>&1"
