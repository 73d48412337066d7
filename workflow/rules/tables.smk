# `snakemake table_ablation`: the runs of that table of config/tables.yaml, and the table, for each of its datasets
for table in CONFIG.tables:

    rule:
        name:
            f"table_{table}"
        input:
            table_files(table),
        localrule: True


rule write_table:
    input:
        table_runs,
    output:
        csv="results/{dataset}/tables/{table}.csv",
        markdown="results/{dataset}/tables/{table}.md",
        latex="results/{dataset}/tables/{table}.tex",
    log:
        "results/{dataset}/logs/tables/{table}.log",
    conda:
        "../../envs/gmmamba.yaml"
    resources:
        mem_mb=growing(4000),
        runtime=growing(60),
    params:
        settings=table_settings,
        results="results/{dataset}",
        code=code_digest("gmmamba.tables"),
    shell:
        "python -m gmmamba table --settings {params.settings:q} --results {params.results} --csv {output.csv}"
        " --markdown {output.markdown} --latex {output.latex} > {log} 2>&1"
