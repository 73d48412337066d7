rule evaluate:
    input:
        experiment_predictions,
    output:
        metrics="results/{dataset}/{experiment}/metrics.csv",
        pooled="results/{dataset}/{experiment}/pooled.csv",
    log:
        "results/{dataset}/logs/evaluate/{experiment}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(15),
    params:
        classes=classes,
        settings=evaluation_settings,
        code=code_digest("gmmamba.evaluation"),
    shell:
        "python -m gmmamba evaluate --classes {params.classes:q} --settings {params.settings:q} --predictions {input}"
        " --metrics {output.metrics} --pooled {output.pooled} > {log} 2>&1"


rule compare:
    input:
        dataset_predictions,
    output:
        "results/{dataset}/comparisons.csv",
    log:
        "results/{dataset}/logs/compare.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(60),
    params:
        folder=output_folder,
        experiments=experiment_names,
        settings=evaluation_settings,
        runs=run_options,
        code=code_digest("gmmamba.comparison"),
    shell:
        "python -m gmmamba compare {params.folder} {params.experiments} --settings {params.settings:q}"
        " {params.runs} --output {output} > {log} 2>&1"
