"""What ``model.parameters`` may hold for a model that torch runs here."""

from __future__ import annotations

__all__ = ["MODEL_PARAMETERS", "check_parameters", "check_whole"]

import difflib
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.errors import NotSupported
from spider_worker.torch_models.device import DEVICE, check_device

MODEL_PARAMETERS: Final = {
    "device": DEVICE,
    "dtype": "float32, bfloat16, float16 or auto (default: float32 on the CPU, auto on a GPU)",
    "revision": "commit, tag or branch of the model",
    "max_model_len": "tokens of prompt and completion together (default: the model's)",
    "attn_implementation": "eager, sdpa, flash_attention_2 (default: the model's)",
    "trust_remote_code": "run the model repository's own code (if the worker allows it)",
    "max_batch": "sequences that are sampled together (default: 256; on the CPU as many of them as "
    "take 1 GiB, at least 64)",
    "batch_tokens": "tokens, padding included, that are scored together (default: 16384)",
}
"""Name and meaning of each."""

_DTYPES: Final = ("float32", "bfloat16", "float16", "auto")


def check_parameters(
    parameters: Mapping[str, Any], known: Mapping[str, str], *, what: str, where: str
) -> None:
    """Raises NotSupported for a parameter that is not ``known`` or malformed. ``what`` takes
    them (``the local trainer``), ``where`` is their dotted path in the job."""
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise NotSupported(
                f"{where}.{name}: {what} has no such option{hint}. "
                f"It knows: {', '.join(sorted(known))}."
            )
    check_device(parameters, where=where)
    if parameters.get("dtype", "auto") not in _DTYPES:
        raise NotSupported(f"{where}.dtype: expected one of {', '.join(_DTYPES)}.")
    for name in ("max_model_len", "max_batch", "batch_tokens"):
        check_whole(parameters, name, where=where)


def check_whole(parameters: Mapping[str, Any], name: str, *, where: str) -> None:
    """Raises NotSupported unless ``name`` is absent or a whole number from 1."""
    value = parameters.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise NotSupported(f"{where}.{name}: expected a whole number from 1, not {value!r}.")
