rule evaluate:
    input:
        experiment_predictions,
    output:
        "results/{dataset}/{experiment}/metrics.csv",
    log:
        "results/{dataset}/logs/evaluate/{experiment}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(15),
    params:
        classes=classes,
        code=code_digest("gmmamba.evaluation"),
    shell:
        "python -m gmmamba evaluate --classes {params.classes:q} --predictions {input} --output {output} > {log} 2>&1"
