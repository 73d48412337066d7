# New slides, by trained experiments: `snakemake predict_new`, also part of `all`
rule record_pipeline:
    input:
        models=trained_models,
        tables=dataset_tables,
    output:
        "results/{dataset}/{experiment}/pipeline.json",
    log:
        "results/{dataset}/logs/record_pipeline/{experiment}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        settings=pipeline_settings,
        tables=table_options,
        models=trained_folders,
        code=code_digest("gmmamba.inference.pipeline"),
    shell:
        "python -m gmmamba record-pipeline --settings {params.settings:q} {params.tables} --models {params.models}"
        " --output {output} > {log} 2>&1"


rule predict_slides:
    input:
        models=ensemble_files,
        stores=new_stores,
    output:
        predictions="results/{prediction}/predictions.csv",
        members="results/{prediction}/members.csv",
    log:
        "results/{prediction}/logs/predict.log",
    conda:
        "../../envs/gmmamba.yaml"
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=growing(240),
        gpu=1,
    params:
        options=new_slides_options,
        rows=new_slides_rows,
        folder=output_folder,
        code=new_slides_code,
    shell:
        "python -m gmmamba predict {params.options:q} --prepared --threads {threads} --output {params.folder}"
        " > {log} 2>&1"


rule picture_patches:
    input:
        "results/{prediction}/predictions.csv",
    output:
        touch("results/{prediction}/.patches"),
    log:
        "results/{prediction}/logs/picture_patches.log",
    conda:
        "../../envs/preprocessing.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
    params:
        folder=output_folder,
        code=code_digest("preprocessing.patch_picture"),
    shell:
        "python -m preprocessing picture-patches --predictions {params.folder} > {log} 2>&1"


rule predict_new:
    input:
        predictions(),
    localrule: True
