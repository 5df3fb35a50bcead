"""Tinker's protobuf messages in the words of its JSON, and back.

Versions of the SDK from 0.25 on send training passes as protobuf, and read passes and samples so.
The messages are the SDK's own.
"""

from __future__ import annotations

__all__ = ["encoded", "pass_in_words"]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NO_LOGPROB = -99999.0
_LENGTH = 4  # the field's number


def pass_in_words(raw: bytes) -> tuple[str, dict[str, Any]]:
    """A forward or backward pass: the request for it, and its body."""
    from tinker.proto import tinker_public_pb2 as messages

    message = messages.ForwardBackwardRequest.FromString(raw)
    data = [
        {
            "model_input": {
                "chunks": [
                    {"tokens": np.frombuffer(chunk.encoded_text.tokens, np.int32).tolist()}
                    for chunk in datum.model_input
                ]
            },
            "loss_fn_inputs": {
                name: _tensor_in_words(messages, tensor)
                for name, tensor in datum.loss_fn_inputs.items()
            },
        }
        for datum in message.data
    ]
    config = dict(message.loss_fn_config) or None
    passed = {"data": data, "loss_fn": message.loss_fn, "loss_fn_config": config}
    kind = "forward" if message.forward_only else "forward_backward"
    return f"POST /api/v1/{kind}", {"model_id": message.model_id, f"{kind}_input": passed}


def encoded(answer: Mapping[str, Any]) -> bytes:
    """A sample or the outcome of a pass."""
    from tinker.proto import tinker_public_pb2 as messages

    if "sequences" in answer:
        return _sample(messages, answer)
    message = messages.ForwardBackwardOutput(
        loss_fn_output_type=answer.get("loss_fn_output_type", ""),
        metrics=answer.get("metrics", {}),
    )
    outputs = answer["loss_fn_outputs"]
    record = message.loss_fn_outputs.add(num_datums=len(outputs))
    arrays = [np.asarray(output["logprobs"]["data"], np.float32) for output in outputs]
    field = record.fields["logprobs"]
    field.dtype = messages.DTYPE_FLOAT32
    field.data = b"".join(array.tobytes() for array in arrays)
    ends = np.cumsum([0, *(array.nbytes for array in arrays)])
    field.offsets = ends.astype(np.int64).tobytes()
    field.trailing_shape.extend(outputs[0]["logprobs"]["shape"][1:])
    return bytes(message.SerializeToString())


def _sample(messages: Any, answer: Mapping[str, Any]) -> bytes:
    message = messages.SampleResponse()
    for sequence in answer["sequences"]:
        message.sequences.add(
            stop_reason=messages.STOP_REASON_STOP
            if sequence["stop_reason"] == "stop"
            else messages.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence["tokens"], np.int32).tobytes(),
            logprobs=np.asarray(sequence["logprobs"], np.float32).tobytes(),
        )
    if (logprobs := answer.get("prompt_logprobs")) is not None:
        numbers = [np.nan if value is None else value for value in logprobs]
        message.prompt_logprobs = np.asarray(numbers, np.float32).tobytes()
    if (rows := answer.get("topk_prompt_logprobs")) is not None:
        _write_topk(message.topk_prompt_logprobs, rows)
    return bytes(message.SerializeToString())


def _write_topk(message: Any, rows: Sequence[Any]) -> None:
    k = max(len(row or ()) for row in rows)
    ids = np.zeros((len(rows), k), np.int32)
    logprobs = np.full((len(rows), k), _NO_LOGPROB, np.float32)
    for number, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row or ()):
            ids[number, place], logprobs[number, place] = token, logprob
    message.token_ids, message.logprobs = ids.tobytes(), logprobs.tobytes()
    message.k = k
    # ``prompt_length`` until it was called ``length``.
    setattr(message, message.DESCRIPTOR.fields_by_number[_LENGTH].name, len(rows))


def _tensor_in_words(messages: Any, tensor: Any) -> dict[str, Any]:
    whole = tensor.dtype == messages.DTYPE_INT64
    values = np.frombuffer(tensor.dense, np.int64 if whole else np.float32)
    return {
        "data": values.tolist(),
        "dtype": "int64" if whole else "float32",
        "shape": list(tensor.shape),
    }
