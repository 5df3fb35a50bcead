"""An output.jsonl is evaluated with everything real."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from spider_worker.evaluation.evaluate import evaluate_file
from spider_worker.evaluation.predictions import export_predictions
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.trajectories import record
from spider_worker.trajectories.output_file import append, read
from tests.support.boxes import workspace
from tests.support.swe_repos import make_repos


def test_an_output_file_is_evaluated_and_exported(tmp_path: Path) -> None:
    repos = [repo for repo in make_repos(tmp_path / "repos") if repo.folder.name != "binary"][:2]
    tasks = {
        repo.instance_id: Task(
            repo.instance_id, repo.repo, repo.problem_statement, Origin("bundle", str(repo.bundle)),
            base_commit=repo.base_commit, bug_patch=repo.bug_patch,
            fail_to_pass=repo.fail_to_pass, pass_to_pass=repo.pass_to_pass, test_cmd=repo.test_cmd,
        )
        for repo in repos
    }  # fmt: skip
    path = tmp_path / "run" / "output.jsonl"
    patches = [repos[0].gold_patch, repos[1].gold_patch, "", "nonsense"]
    for number, patch in enumerate(patches):
        append(
            path,
            record.build(
                instance_id=repos[number % 2].instance_id, status="finished", instance={},
                metadata={}, git_patch=patch, n=number // 2,
            ),
        )  # fmt: skip
    place = workspace("bwrap", tmp_path / "boxes")
    summary = asyncio.run(
        evaluate_file(path, tasks, place, num_workers=2, cache=tmp_path / "checks", interval=0.0)
    )
    assert (summary.judged, summary.resolved, summary.unresolved) == (4, 2, 2)
    found = list(read(path))
    assert [one.resolved for one in found] == [True, True, False, False]
    assert found[2].report["empty_generation"]
    assert found[3].report["failed_apply_patch"]
    written = export_predictions(path, tmp_path / "predictions.jsonl", model="m")
    files = written.files
    exported = [json.loads(text) for file in files for text in file.read_text().splitlines()]
    assert [one["model_patch"] for one in exported] == patches
    again = asyncio.run(evaluate_file(path, tasks, place, cache=tmp_path / "checks"))
    assert (again.judged, again.skipped) == (0, 4)
