"""From the files of a checkpoint to an adapter in PEFT's format."""

from __future__ import annotations

__all__ = ["ADAPTER_FILES", "convert_adapter", "unpack"]

import json
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import FatalJobError

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (_CONFIG, _WEIGHTS)
"""The files of an adapter."""

_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
_HEAD: Final = ("model.unembed_tokens", "lm_head")
#: The projections of an expert, as Tinker names them and as models on the Hub do.
_EXPERT: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def unpack(archive: Path, folder: Path) -> None:
    """Write the adapter's files in the tar file ``archive`` to ``folder``, and nothing else that it
    may hold. Raises FatalJobError where it does not have them."""
    missing = set(ADAPTER_FILES)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                source = tar.extractfile(member) if name in missing else None
                if source is None:
                    continue
                with source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                missing.discard(name)
    except (tarfile.TarError, EOFError) as error:
        raise FatalJobError(f"the service's checkpoint is no archive: {error}") from error
    if missing:
        raise FatalJobError(f"the service's checkpoint has no {', '.join(sorted(missing))}")


def convert_adapter(folder: Path, *, base_model: str, rank: int) -> None:
    """Put right the two files in ``folder``, which are the service's.

    Services leave out which modules the adapter is for, name the head in their own way, and keep
    the experts of a mixture in one tensor. Raises FatalJobError for what is no adapter or holds
    tensors of unknown meaning.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save_file

    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        # Read whole: the file is written over, and must not be mapped.
        tensors = load((folder / _WEIGHTS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise FatalJobError(f"the service's checkpoint is no adapter: {error}") from error
    if config.get("r") != rank or "lora_alpha" not in config:
        raise FatalJobError(
            f"the service's checkpoint has LoRA rank {config.get('r')} and lora_alpha"
            f" {config.get('lora_alpha')}, and rank {rank} was trained"
        )
    found = _renamed(tensors)
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in found})
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / _CONFIG).write_text(
        json.dumps(_config(config, base_model, modules), indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )


def _renamed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise FatalJobError(
                f"the service's checkpoint holds {name!r}, which PEFT does not know"
            )
        if tensor.ndim == 3 and ".experts." in name:
            found |= _experts(name, tensor, tensors)
        elif tensor.ndim == 2:
            found[name.replace(*_HEAD)] = tensor
        else:
            raise FatalJobError(
                f"the service's checkpoint holds {name!r} of shape {tuple(tensor.shape)}, which"
                " PEFT does not know"
            )
    return found


def _experts(name: str, tensor: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """One name an expert. A side that all experts share is stored once."""
    a, b = ".lora_A.", ".lora_B."
    other = tensors.get(name.replace(a, b) if a in name else name.replace(b, a))
    count = max(len(tensor), 0 if other is None else len(other))
    before, _, after = name.partition(".experts.")
    leaf, dot, rest = after.partition(".")
    leaf = _EXPERT.get(leaf, leaf)
    return {
        f"{before}.experts.{number}.{leaf}{dot}{rest}": tensor[
            number if len(tensor) > 1 else 0
        ].clone()
        for number in range(count)
        if tensor.numel()
    }


def _config(config: Mapping[str, Any], base_model: str, modules: list[str]) -> dict[str, Any]:
    known = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return {
        **known,
        "base_model_name_or_path": base_model,
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": modules,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
