"""Our side of the on-policy benchmarks: one job through the pipeline, in this process.

    python -m benchmarks.peers.spider_run SPEC.json OUT.json

``SPEC.json`` is what ``bench_onpolicy`` writes for both sides (see ``Spec`` there). The job is
planned, run and finalised by ``run_job_locally``, on the parts that a worker uses. A step's time
is from its event to the next one's, so that everything that the pipeline does counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

SIGNALS = ("sampled", "topk", "full", "auto")
CPU: Final = {"device": "cpu"}  # as GOLD is told


class Clock:
    """Time during which at least one call was at work: calls overlap, and are not counted twice."""

    def __init__(self) -> None:
        self._running = 0
        self._began = 0.0
        self.busy = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        if not self._running:
            self._began = time.perf_counter()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self.busy += time.perf_counter() - self._began


class Measured:
    """A trainer or an engine whose calls count on a clock."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def sampler(self) -> Any:
        with self._clock.measured():
            return Measured(await self._inner.sampler(), self._clock)

    async def sample(self, *args: Any, **options: Any) -> Any:
        with self._clock.measured():
            return await self._inner.sample(*args, **options)

    async def compute_logprobs(self, *args: Any, **options: Any) -> Any:
        with self._clock.measured():
            return await self._inner.compute_logprobs(*args, **options)

    async def compute_distributions(self, *args: Any, **options: Any) -> Any:
        with self._clock.measured():
            return await self._inner.compute_distributions(*args, **options)

    async def forward_backward(self, *args: Any, **options: Any) -> Any:
        with self._clock.measured():
            return await self._inner.forward_backward(*args, **options)

    async def optim_step(self, *args: Any, **options: Any) -> Any:
        with self._clock.measured():
            return await self._inner.optim_step(*args, **options)


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch

    from spider_worker.pipelines.onpolicy_train.build import real_parts
    from spider_worker.pipelines.onpolicy_train.pipeline import OnPolicyPipeline
    from spider_worker.settings import WorkerSettings
    from spider_worker.testing import LocalContext, LocalStore, run_job_locally

    torch.set_num_threads(spec["threads"])
    clock = Clock()
    marks: list[tuple[float, float, float]] = []  # at each step's event: time, busy time, CPU

    def heard(level: str, code: str, message: str, data: Any) -> None:
        del level, message, data
        if code == "train.step":
            marks.append((time.perf_counter(), clock.busy, time.process_time()))

    prompts = Path(spec["prompts"])
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
    job = _job(spec, prompts.name, digest)
    roots = {str(Path(spec[name]).parent) for name in ("student", "teacher")}
    parts = real_parts(WorkerSettings(data_roots=":".join(sorted(roots))))
    parts = dataclasses.replace(
        parts,
        trainer=lambda ctx, seed, make=parts.trainer: Measured(make(ctx, seed), clock),
        teacher=lambda ctx, config, make=parts.teacher: Measured(make(ctx, config), clock),
    )
    ctx = LocalContext(LocalStore(folder), job, inputs={digest: prompts}, on_event=heard)
    asyncio.run(run_job_locally(OnPolicyPipeline(job, parts), ctx))
    records = [
        json.loads(line)
        for line in (folder / "artifacts" / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "seconds": [b[0] - a[0] for a, b in itertools.pairwise(marks)],
        "cpu": [b[2] - a[2] for a, b in itertools.pairwise(marks)],
        "busy": [b[1] - a[1] for a, b in itertools.pairwise(marks)],
        "tokens": [record["tokens"] for record in records[1:]],
        "tokens_total": records[-1]["tokens_total"],
        "phases": {
            name: [record[f"seconds/{name}"] for record in records[1:]]
            for name in ("sample", "score", "train")
        },
        "records": records,
        "adapter": str(folder / "artifacts" / "adapter"),
    }


def _job(spec: dict[str, Any], prompts: str, digest: str) -> Any:
    from spider_sdk.config.model import (
        GenerationConfig,
        InputFile,
        JobConfig,
        ModelConfig,
        OnPolicyOptions,
        SourceConfig,
        TeacherConfig,
    )

    options = OnPolicyOptions(
        teacher=(TeacherConfig(spec["teacher"], signal=spec["signal"], parameters=CPU),),
        learning_rate=spec["learning_rate"],
        lr_schedule=spec["schedule"],
        groups_per_batch=spec["prompts_a_step"],
        group_size=spec["samples"],
        max_tokens=spec["max_tokens"],
        lora_rank=spec["lora_rank"],
        baseline=spec["baseline"],
        num_substeps=spec["num_substeps"],
        token_budget=spec["token_budget"],
        epochs=spec["epochs"],
        seed=spec["seed"],
        eval_examples=0,
    )
    parameters = {"lora_alpha": spec["lora_alpha"], **CPU}
    return JobConfig(
        model=ModelConfig("local", spec["student"], parameters),
        source=SourceConfig(
            prompts,
            field="question",
            shuffle=spec["epochs"] > 1,
            inputs=(InputFile(prompts, digest),),
        ),
        generation=GenerationConfig(on_policy=True, on_policy_options=options),
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    folder = out.with_suffix(".job")
    out.write_text(json.dumps(run(spec, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
