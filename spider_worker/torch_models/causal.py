"""A causal language model whose hidden states and logits are to be had apart.

(B, T, V) logits of a prompt are what fills a device; whoever needs a few positions of a
sequence runs ``hidden`` over all of it and ``logits`` over those.
"""

from __future__ import annotations

__all__ = ["CausalModel", "load_model"]

import importlib
from collections.abc import Mapping
from typing import Any, Final

import torch

from spider_sdk.errors import EngineUnavailable, NotSupported
from spider_worker.torch_models.device import choose_device
from spider_worker.torch_models.lean import LeanModel

_FLAWS: Final = (OSError, ValueError, KeyError, ImportError, RuntimeError)


class CausalModel:
    """``module`` is a ``transformers`` model for causal language modelling, LoRA layers in it or
    not. ``context`` is the most tokens of a sequence, ``vocabulary`` the width of the logits,
    which may be more than the tokenizer has tokens."""

    def __init__(self, module: Any, *, name: str, context: int) -> None:
        self.module = module
        self.name = name
        self.context = context
        self.device = next(module.parameters()).device
        self.config = module.config.get_text_config()
        self._backbone = module.base_model
        self.vocabulary = int(module.get_output_embeddings().weight.shape[0])
        kinds = getattr(self.config, "layer_types", None) or ()
        sliding = getattr(self.config, "sliding_window", None) and not kinds
        full = all(kind == "full_attention" for kind in kinds)
        #: Whether a batch may hold prompts of several lengths under a mask of our own.
        self.takes_masks = self.config._attn_implementation == "sdpa" and full and not sliding

        #: Whether ``lean`` may be asked for; ``load_model`` finds out.
        self.may_be_lean = False
        self._lean: LeanModel | None = None

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the cache that a token has while its sequence is sampled; None where it is not
        the same in each layer."""
        config = self.config
        heads = getattr(config, "num_attention_heads", None)
        kept = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None)
        if not (isinstance(heads, int) and isinstance(kept, int)):
            return None
        size = size if isinstance(size, int) else config.hidden_size // heads
        return int(2 * config.num_hidden_layers * kept * size * self.module.dtype.itemsize)

    @property
    def lean(self) -> LeanModel | None:
        """The model as it is now, laid out for few calls, for inference; None where that cannot
        be. It is made once, until ``changed``."""
        if self._lean is None and self.may_be_lean and LeanModel.fits(self.module):
            self._lean = LeanModel(self.module)
        return self._lean if self.may_be_lean else None

    def changed(self) -> None:
        """To be called after each change of the weights."""
        self._lean = None

    def hidden(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """(B, T) token ids to (B, T, H) hidden states. Rows of several lengths are padded on the
        right: attention is causal, so that what stands before the padding never sees it."""
        output = self._backbone(input_ids=ids, **{"use_cache": False, **options})
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(P, H) to (P, V), float32."""
        # Looked up at each call: adapters replace the module.
        logits: torch.Tensor = self.module.get_output_embeddings()(hidden).float()
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):
            logits = logits / divisor
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.inference_mode()
    def check(self) -> None:
        """Raises NotSupported where the model makes its logits in another way than ``logits``."""
        ids = torch.arange(4, device=self.device).unsqueeze(0) % self.vocabulary
        ours = self.logits(self.hidden(ids)[0])
        theirs = self.module(input_ids=ids, use_cache=False).logits[0].float()
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise NotSupported(
                f"{self.name!r} ({type(self.module).__name__}) makes its logits in a way that is "
                "not known here. Use a model of another family, or serve it with vllm."
            )


def load_model(name: str, parameters: Mapping[str, Any], *, where: str) -> CausalModel:
    """The model ``name`` under checked ``parameters``, which stand at ``where`` in the job.

    Raises EngineUnavailable: no GPU, no such model, one that is broken or too large.
    """
    # It stands on this module.
    from spider_worker.torch_models.steps import is_lean

    transformers: Any = importlib.import_module("transformers")
    device = choose_device(parameters, where=where)
    options: dict[str, Any] = {
        key: parameters[key]
        for key in ("revision", "trust_remote_code", "attn_implementation")
        if key in parameters
    }
    options["dtype"] = parameters.get("dtype", "float32" if device == "cpu" else "auto")
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
        module = module.to(device).eval().requires_grad_(False)
    except _FLAWS as error:
        raise EngineUnavailable(
            f"The model {name!r} could not be loaded: {type(error).__name__}: {error}"
        ) from error
    config = module.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2048
    model = CausalModel(
        module, name=name, context=min(longest, parameters.get("max_model_len", longest))
    )
    model.check()
    model.may_be_lean = is_lean(model)
    model.changed()  # what the trial made is not wanted yet
    return model
