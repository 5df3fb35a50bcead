"""A LoRA adapter on a model: made, merged for sampling, written and read in PEFT's format."""

from __future__ import annotations

__all__ = ["WEIGHTS", "Adapter"]

import contextlib
import copy
import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from spider_sdk.errors import EngineUnavailable, FatalJobError, NotSupported
from spider_worker.torch_models.causal import CausalModel
from spider_worker.trainers.local.merged import Exchange, merge, swapped

WEIGHTS: Final = "adapter_model.safetensors"  #: PEFT's own name of the file
_NAME: Final = "default"  # PEFT's own name of an adapter that has none


class Adapter:
    """LoRA layers on ``model`` (``targets`` as PEFT's ``target_modules``), with B = 0.

    ``weights`` are the trained tensors by the names that they have in PEFT's files. All of them
    are float32, whatever the model's own type.
    """

    def __init__(
        self,
        model: CausalModel,
        *,
        rank: int,
        alpha: float,
        targets: str | Sequence[str],
        seed: int | None,
    ) -> None:
        peft = _peft()
        self._model = model
        self.rank, self.alpha = rank, alpha
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        gpu = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpu):
            torch.manual_seed(secrets.randbits(62) if seed is None else seed % 2**63)
            try:
                self._peft: Any = peft.get_peft_model(model.module, config)
            except ValueError as error:  # no such modules
                raise NotSupported(f"target_modules of {model.name!r}: {error}") from error
        model.module.eval()
        state = peft.get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        by_address = {p.data_ptr(): p for p in model.module.parameters() if p.requires_grad}
        self.weights: dict[str, torch.nn.Parameter] = {
            name: by_address[tensor.data_ptr()] for name, tensor in sorted(state.items())
        }
        self.targets = tuple(sorted(self._config.target_modules))
        self._merged: list[Exchange] | None = None
        model.changed()

    @property
    def _config(self) -> Any:
        return self._peft.peft_config[_NAME]

    def changed(self) -> None:
        """To be called after each change of ``weights``: what was merged is stale."""
        self._merged = None
        self._model.changed()

    def merged(self) -> contextlib.AbstractContextManager[None]:
        """While entered, the model has the adapter in its weights, where that is exact to float32's
        rounding and memory allows; otherwise it is as it is. For inference, on one thread."""
        return swapped(self._exchanges(), train=False)

    def trained(self) -> contextlib.AbstractContextManager[None]:
        """As ``merged``, for a step that trains the adapter: gradients go to ``weights``."""
        return swapped(self._exchanges(), train=True)

    def _exchanges(self) -> list[Exchange]:
        if self._merged is None:
            self._merged = merge(self._model.module, _NAME)
        return self._merged

    def load(self, weights: Mapping[str, torch.Tensor], origin: str) -> None:
        """Take these values. Raises FatalJobError unless names and shapes are the adapter's;
        ``origin`` says where they are from."""
        missing = sorted(self.weights.keys() ^ weights.keys())
        if missing:
            raise FatalJobError(
                f"{origin} adapts other modules than this job ({missing[0]} is in one of the two "
                "alone). Set model.parameters.target_modules to the modules that it adapts, or "
                "start from another adapter."
            )
        for name, own in self.weights.items():
            if own.shape != weights[name].shape:
                raise FatalJobError(
                    f"{origin} has {name} of shape {tuple(weights[name].shape)}, the base model "
                    f"{self._model.name!r} needs {tuple(own.shape)}: it is an adapter of another "
                    "base model."
                )
        with torch.no_grad():
            for name, own in self.weights.items():
                own.copy_(weights[name])
        self.changed()

    def read(self, checkpoint: str) -> None:
        """Take the adapter at ``checkpoint``, a PEFT folder or a Hub name. Raises FatalJobError
        if it cannot be read, or is of another base model, rank, scale or kind."""
        from safetensors import SafetensorError

        peft = _peft()
        origin = f"The checkpoint {checkpoint!r}"
        try:
            config = peft.PeftConfig.from_pretrained(checkpoint)
            weights = peft.load_peft_weights(checkpoint, device="cpu")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FatalJobError(
                f"{origin} is no PEFT adapter that can be read: {type(error).__name__}: {error}"
            ) from error
        self._check_config(config, origin)
        self.load(weights, origin)

    def _check_config(self, config: Any, origin: str) -> None:
        if str(config.peft_type).rpartition(".")[2] != "LORA" or config.use_dora:
            raise FatalJobError(
                f"{origin} is no plain LoRA adapter; training goes on from no other."
            )
        base = str(config.base_model_name_or_path)
        if not _same_model(base, self._model.name):
            raise FatalJobError(
                f"{origin} is an adapter of the base model {base!r}, and this job trains "
                f"{self._model.name!r}."
            )
        if config.r != self.rank or config.rank_pattern:
            pattern = " and ranks of its own for some modules" if config.rank_pattern else ""
            raise FatalJobError(
                f"{origin} has LoRA rank {config.r}{pattern}, and this job asks for {self.rank}. "
                f"Set lora_rank to {config.r}, or start from another adapter."
            )
        alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1)
        if alpha != self.alpha or config.alpha_pattern:
            raise FatalJobError(
                f"{origin} is scaled by lora_alpha {alpha:g}, and this job by {self.alpha:g}. Set "
                f"model.parameters.lora_alpha to {alpha:g}."
            )

    def write(self, folder: Path) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors`` in the empty ``folder``."""
        from safetensors.torch import save_file

        config = copy.copy(self._config)
        config.base_model_name_or_path, config.inference_mode = self._model.name, True
        config.target_modules = list(self.targets)  # a set would be written in any order
        config.save_pretrained(folder)
        tensors = {name: own.detach().cpu().contiguous() for name, own in self.weights.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise EngineUnavailable(
            f"The local trainer needs the package peft, which does not import here ({error}): "
            "install the worker with the extra onpolicy."
        ) from error


def _same_model(one: str, other: str) -> bool:
    """Two folders are compared as such; otherwise a model may be named by its folder here and
    by its Hub name there, and the last part of the name decides (shapes are checked anyway)."""
    if one == other:
        return True
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    return one.rstrip("/").rpartition("/")[2] == other.rstrip("/").rpartition("/")[2]
