"""What the paper's tables are made of."""


def table_runs(wildcards):
    """The metrics of each row, and the predictions that they are from."""
    rows = [experiment_name(row, CONFIG.table_protocol) for row in CONFIG.tables[wildcards.table].rows]
    return [file for name in rows for file in (
        f"results/{wildcards.dataset}/{name}/metrics.csv", *runs(wildcards.dataset, name, "predictions.csv")
    )]  # fmt: skip


def table_settings(wildcards):
    dataset = CONFIG.datasets[wildcards.dataset]
    return json.dumps(
        {
            "table": asdict(CONFIG.tables[wildcards.table]),
            "protocol": CONFIG.table_protocol,
            "dataset": dataset.name,
            "classes": dataset.classes,
            "folds": dataset.folds,
            "seeds": dataset.seeds,
        }
    )  # rows in their order: keys are not sorted


def table_files(table):
    return expand(
        "results/{dataset}/tables/{table}.{form}",
        dataset=CONFIG.table_datasets[table],
        table=table,
        form=["csv", "md", "tex"],
    )
