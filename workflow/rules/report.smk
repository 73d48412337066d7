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
        manifest="results/{dataset}/report.json",
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
        costs=costs_version,
        code=code_digest("gmmamba.report", files=(ROOT / "gmmamba/report.html.j2",)),
    shell:
        "python -m gmmamba report --settings {params.settings:q} {params.tables} {params.groups}"
        " --splits {input.splits} --results {params.results} --output {output.report} --table {output.table}"
        " --accounting {output.accounting} --manifest {output.manifest} > {log} 2>&1"
