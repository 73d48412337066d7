rule train:
    input:
        splits="results/{dataset}/splits.csv",
        tables=dataset_tables,
        groups=experiment_groups,
        first_stage=first_stage,
    output:
        model="results/{dataset}/{experiment}/fold{fold}_seed{seed}/model.safetensors",
        settings="results/{dataset}/{experiment}/fold{fold}_seed{seed}/model.json",
        history="results/{dataset}/{experiment}/fold{fold}_seed{seed}/history.csv",
    log:
        "results/{dataset}/logs/train/{experiment}/fold{fold}_seed{seed}.log",
    conda:
        "../../envs/gmmamba.yaml"
    threads: 1
    resources:
        mem_mb=growing(8000),
        runtime=growing(720),
        gpu=1,
    params:
        folder=output_folder,
        tables=table_options,
        groups=group_options,
        stage=first_stage_option,
        experiment=experiment_settings,
        code=model_code,
    shell:
        "python -m gmmamba train --experiment {params.experiment:q} --fold {wildcards.fold} --seed {wildcards.seed}"
        " --splits {input.splits} {params.tables} {params.groups} --threads {threads}"
        " --cache-mb $(({resources.mem_mb} / 4)) {params.stage} --output {params.folder} > {log} 2>&1"


use rule train as train_first_stage with:  # of two, for the methods that have them (gmmamba.models.TWO_STAGES)
    input:
        splits="results/{dataset}/splits.csv",
        tables=dataset_tables,
        groups=experiment_groups,
    output:
        model="results/{dataset}/{experiment}/fold{fold}_seed{seed}/first_stage/model.safetensors",
        settings="results/{dataset}/{experiment}/fold{fold}_seed{seed}/first_stage/model.json",
        history="results/{dataset}/{experiment}/fold{fold}_seed{seed}/first_stage/history.csv",
    log:
        "results/{dataset}/logs/train/{experiment}/fold{fold}_seed{seed}.first_stage.log",
    params:
        folder=output_folder,
        tables=table_options,
        groups=group_options,
        stage="--stage 1",
        experiment=experiment_settings,
        code=model_code,


rule predict:
    input:
        splits="results/{dataset}/splits.csv",
        tables=dataset_tables,
        groups=experiment_groups,
        model="results/{dataset}/{experiment}/fold{fold}_seed{seed}/model.safetensors",
        settings="results/{dataset}/{experiment}/fold{fold}_seed{seed}/model.json",
    output:
        predictions="results/{dataset}/{experiment}/fold{fold}_seed{seed}/predictions.csv",
        attention="results/{dataset}/{experiment}/fold{fold}_seed{seed}/attention.npz",
    log:
        "results/{dataset}/logs/predict/{experiment}/fold{fold}_seed{seed}.log",
    conda:
        "../../envs/gmmamba.yaml"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(60),
        gpu=1,
    params:
        folder=model_folder,
        tables=table_options,
        groups=group_options,
        code=prediction_code,
    shell:
        "python -m gmmamba predict-fold --model {params.folder} --fold {wildcards.fold} --seed {wildcards.seed}"
        " --splits {input.splits} {params.tables} {params.groups} --threads {threads}"
        " --predictions {output.predictions} --attention {output.attention} > {log} 2>&1"
