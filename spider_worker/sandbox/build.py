"""From a job's config and the worker's settings to a sandbox."""

from __future__ import annotations

__all__ = ["build_sandbox"]

from collections.abc import Callable

from spider_sdk.config.model import ProcessorConfig, RuntimeConfig
from spider_sdk.errors import NotSupported
from spider_worker.sandbox.base import Sandbox
from spider_worker.sandbox.packages import PackageEnvironment, check_requirements
from spider_worker.sandbox.process import ProcessSandbox
from spider_worker.settings import WorkerSettings


def build_sandbox(
    processor: ProcessorConfig,
    runtime: RuntimeConfig,
    settings: WorkerSettings,
    *,
    stage: str,
    on_output: Callable[[str], None] | None = None,
) -> Sandbox:
    """A sandbox, not started yet, for a job's function. ``stage`` is ``pre_processor``,
    ``post_processor`` or ``evaluator``; ``on_output`` gets what the function prints.

    Environments of ``runtime.packages`` are built by ``start``. Raises NotSupported where
    this worker does not install packages, FatalJobError for a requirement that it refuses.
    """
    environment = None
    if runtime.packages:
        if not settings.allow_packages:
            raise NotSupported(
                "runtime.packages: this worker installs no packages (SPIDER_ALLOW_PACKAGES=false)"
            )
        environment = PackageEnvironment(check_requirements(runtime.packages), settings.env_cache)
    return ProcessSandbox(
        name=processor.name,
        source=processor.source,
        kwargs=processor.kwargs,
        stage=stage,
        env=runtime.env,
        environment=environment,
        row_timeout=settings.sandbox_row_timeout,
        memory_mb=settings.sandbox_memory_mb,
        mode=settings.sandbox,
        on_output=on_output,
    )
