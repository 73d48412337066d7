from pathlib import Path

from benchmarks.dag import placeholder_project, plan


def test_a_plan_has_every_job_once(tmp_path: Path) -> None:
    placeholder_project(tmp_path, slides=30, experiments=3, seeds=2)
    jobs = plan(tmp_path).jobs
    assert jobs == {
        "tile_slide": 30, "encode_slide": 30, "contact_sheet": 1, "account_cohort": 1, "group_cohort": 3,
        "split_dataset": 1, "train": 30, "predict": 30, "evaluate": 3, "compare": 1, "report": 1,
        "record_pipeline": 3, "all": 1,
    }  # fmt: skip
