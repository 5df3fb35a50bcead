"""What training goes on from, as one file: the adapter's weights, Adam's moments, the count."""

from __future__ import annotations

__all__ = ["FORMAT", "check_state", "read_state", "write_state"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from spider_sdk.errors import FatalJobError

FORMAT: Final = 1
_FILE: Final = "trainer.safetensors"
_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


def write_state(
    folder: Path,
    weights: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Bit by bit, in ``folder``. A weight that was never stepped has no moments."""
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in weights.items():
        tensors[f"weight/{name}"] = weight.detach().cpu().contiguous()
        for moment, value in optimiser.state.get(weight, {}).items():
            tensors[f"{moment}/{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / _FILE)


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights by name, and moments by name and moment. Raises FatalJobError where they cannot
    be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        raise FatalJobError(f"The state in {folder} cannot be read: {error}") from error
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "weight":
            weights[name] = tensor
        elif kind in _MOMENTS:
            moments.setdefault(name, {})[kind] = tensor
    return weights, moments


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises FatalJobError unless ``state`` is of the trainer that ``own`` describes; the words
    are those of ``LocalTrainer.save_state``."""
    if state.get("trainer") != own["trainer"] or state.get("format") != own["format"]:
        raise FatalJobError(
            f"The state is of the trainer {state.get('trainer')!r} in format "
            f"{state.get('format')!r}; this one is {own['trainer']!r} in format {own['format']}."
        )
    for key, noun in (
        ("base_model", "base model"),
        ("lora_rank", "LoRA rank"),
        ("lora_alpha", "lora_alpha"),
        ("target_modules", "target_modules"),
    ):
        if state.get(key) != own[key]:
            raise FatalJobError(
                f"The state is of {noun} {state.get(key)!r}, and this job trains "
                f"{noun} {own[key]!r}. Resume with the config that the run began with."
            )
