"""What training goes on from: the adapter as PEFT writes it, Adam's moments beside it.

So whoever finds nothing but a state, since no attempt at the run came to an end, has an adapter.
"""

from __future__ import annotations

__all__ = ["FORMAT", "check_state", "read_state", "write_state"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from spider_sdk.errors import FatalJobError
from spider_worker.trainers.local.adapter import WEIGHTS, Adapter

FORMAT: Final = 2
_MOMENTS: Final = "optimizer.safetensors"


def write_state(folder: Path, adapter: Adapter, optimiser: torch.optim.Optimizer) -> None:
    """Bit by bit, in the empty ``folder``. A weight that was never stepped has no moments."""
    from safetensors.torch import save_file

    adapter.write(folder)
    moments = {
        f"{moment}/{name}": value.detach().cpu().contiguous()
        for name, weight in adapter.weights.items()
        for moment, value in optimiser.state.get(weight, {}).items()
    }
    save_file(moments, folder / _MOMENTS)


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights by name, and moments by name and moment. Raises FatalJobError where they cannot
    be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights, tensors = load_file(folder / WEIGHTS), load_file(folder / _MOMENTS)
    except (OSError, SafetensorError) as error:
        raise FatalJobError(f"The state in {folder} cannot be read: {error}") from error
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = tensor
    return weights, moments


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises FatalJobError unless ``state`` is of the trainer that ``own`` describes; the words
    are those of ``LocalTrainer.save_state``."""
    if state.get("trainer") != own["trainer"] or state.get("format") != own["format"]:
        raise FatalJobError(
            f"The state is of the trainer {state.get('trainer')!r} in format "
            f"{state.get('format')!r}; this one is {own['trainer']!r} in format {own['format']}. "
            "Submit the job again, with its last checkpoint as student_checkpoint_path."
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
