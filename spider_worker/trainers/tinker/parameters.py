"""What ``model.parameters`` may hold for the tinker trainer."""

from __future__ import annotations

__all__ = ["TRAINER_PARAMETERS", "check_parameters"]

import difflib
from collections.abc import Mapping
from typing import Any, Final

from spider_sdk.errors import NotSupported
from spider_worker.trainers.tinker.habits import REDUCTIONS

TRAINER_PARAMETERS: Final = {
    "tokenizer": "folder or Hub name of the tokenizer (default: what the service says)",
    "revision": "commit, tag or branch of the tokenizer",
    "trust_remote_code": "run the tokenizer repository's own code (if the worker allows it)",
    "train_attn": "adapt the attention layers (default: the service's, true at Tinker)",
    "train_mlp": "adapt the feed-forward layers (default: the service's, true at Tinker)",
    "train_unembed": "adapt the output layer (default: the service's, true at Tinker)",
    "loss_reduction": "what the server takes of a loss: sum or sequence_mean (default: known)",
    "patience": "seconds that the service may be silent (default: 120)",
}
"""Name and meaning of each."""

_SWITCHES: Final = ("trust_remote_code", "train_attn", "train_mlp", "train_unembed")


def check_parameters(parameters: Mapping[str, Any], *, where: str = "model.parameters") -> None:
    """Raises NotSupported for a parameter that is unknown or malformed."""
    for name in parameters:
        if name not in TRAINER_PARAMETERS:
            near = difflib.get_close_matches(name, TRAINER_PARAMETERS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise NotSupported(
                f"{where}.{name}: the tinker trainer has no such option{hint}. "
                f"It knows: {', '.join(sorted(TRAINER_PARAMETERS))}."
            )
    for name in _SWITCHES:
        if not isinstance(parameters.get(name, True), bool):
            raise NotSupported(f"{where}.{name}: expected true or false.")
    for name in ("tokenizer", "revision"):
        if not isinstance(parameters.get(name, "-"), str):
            raise NotSupported(f"{where}.{name}: expected a text, not {parameters[name]!r}.")
    if parameters.get("loss_reduction", "sum") not in REDUCTIONS:
        raise NotSupported(f"{where}.loss_reduction: expected {' or '.join(REDUCTIONS)}.")
    patience = parameters.get("patience", 120)
    if isinstance(patience, bool) or not isinstance(patience, (int, float)) or patience <= 0:
        raise NotSupported(f"{where}.patience: expected a number above 0, not {patience!r}.")
