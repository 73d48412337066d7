def dataset_experiments(wildcards):
    return [experiment for (dataset, _), experiment in CONFIG.experiments.items() if dataset == wildcards.dataset]


def report_inputs(wildcards):
    """Everything the report draws: metrics, predictions, attention and history of each run, and the groups."""
    dataset = CONFIG.datasets[wildcards.dataset]
    files = []
    for experiment in dataset_experiments(wildcards):
        files.append(f"results/{dataset.name}/{experiment.name}/metrics.csv")
        for file in ("predictions.csv", "attention.npz", "history.csv", "model.json"):
            files += runs(dataset.name, experiment.name, file)
    return files


def report_groups(wildcards):
    cohorts = CONFIG.datasets[wildcards.dataset].cohorts
    used = [experiment for experiment in dataset_experiments(wildcards) if experiment.grouping]
    return sorted({groups_file(cohort, experiment) for cohort in cohorts for experiment in used})


def report_group_options(wildcards):
    return [f"--groups={Path(file).parts[1]}/{Path(file).stem}={file}" for file in report_groups(wildcards)]


def report_settings(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return json.dumps(
        {
            "dataset": dataset.name,
            "experiments": [e.as_dict() for e in dataset_experiments(wildcards)],
            "folds": dataset.folds,
            "seeds": CONFIG.seeds,
            "classes": dataset.classes,
            "encoder": {"name": dataset.encoder, **CONFIG.encoders[dataset.encoder]},
            "settings": CONFIG.report,
            "config": {
                "tiling": {cohort: CONFIG.cohorts[cohort].tiling for cohort in dataset.cohorts},
                "split": json.loads(split_settings(wildcards)),
            },
        },
        sort_keys=True,
    )


rule report:
    input:
        runs=report_inputs,
        tables=dataset_tables,
        groups=report_groups,
        splits="results/{dataset}/splits.csv",
    output:
        report=report(
            "results/{dataset}/report.html",
            caption="../report/report.rst",
            category="{dataset}",
        ),
        table="results/{dataset}/table.csv",
        accounting="results/{dataset}/accounting.csv",
    log:
        "results/{dataset}/logs/report.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(8000),
        runtime=growing(60),
    params:
        settings=report_settings,
        tables=table_options,
        groups=report_group_options,
        results=output_folder,
        code=code_digest("gmmamba.report", files=(Path(workflow.basedir, "gmmamba/report.html.j2"),)),
    shell:
        "python -m gmmamba report --settings {params.settings:q} {params.tables} {params.groups}"
        " --splits {input.splits} --results {params.results} --output {output.report} --table {output.table}"
        " --accounting {output.accounting} > {log} 2>&1"
