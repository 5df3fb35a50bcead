"""``device``, the parameter that says where torch runs a model."""

from __future__ import annotations

__all__ = ["DEVICE", "check_device", "choose_device", "devices_for"]

from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, NotSupported

DEVICE: Final = "auto (default: a GPU where the worker has one, else the CPU), cpu, cuda or cuda:N"
"""What it may be, and means."""


def check_device(parameters: Mapping[str, Any], *, where: str) -> None:
    """Raises NotSupported for a device that is malformed. ``where`` is the dotted path of
    ``parameters`` in the job."""
    device = _device(parameters)
    if device not in ("auto", "cpu", "cuda") and not (
        device.startswith("cuda:") and device.removeprefix("cuda:").isdigit()
    ):
        raise NotSupported(f"{where}.device: expected auto, cpu, cuda or cuda:N, not {device!r}.")


def devices_for(parameters: Mapping[str, Any]) -> int:
    """How many GPUs a runner must have: for ``cuda:N`` all up to that one. A worker without any
    gives none, and ``auto`` can do without."""
    device = _device(parameters)
    if device == "cpu":
        return 0
    number = device.partition(":")[2]
    return int(number) + 1 if number.isdigit() else 1


def choose_device(parameters: Mapping[str, Any], *, where: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``. Imports torch. Raises NotSupported as ``check_device``, and
    EngineUnavailable where the device is a GPU that is not here."""
    import torch

    check_device(parameters, where=where)
    device = _device(parameters)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if devices_for(parameters) > count:
        raise EngineUnavailable(
            f"{where}.device is {device!r}, and this worker has no such GPU that torch can use. "
            "Set it to cpu, or run the job on a worker with a GPU."
        )
    return device


def _device(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("device", "auto"))
