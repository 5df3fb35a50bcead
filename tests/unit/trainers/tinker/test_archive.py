"""What services pack as an adapter, in PEFT's format."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from spider_sdk.errors import FatalJobError
from spider_worker.trainers.tinker.archive import convert_adapter, unpack

LAYER = "base_model.model.model.layers.0"


def pair(module: str, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.arange(rank * 4.0).reshape(rank, 4),
        f"{module}.lora_B.weight": torch.arange(3.0 * rank).reshape(3, rank),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    given = {"r": 2, "lora_alpha": 32, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))


def test_modules_are_named_and_the_head_is_renamed(tmp_path: Path) -> None:
    tensors = pair(f"{LAYER}.self_attn.q_proj") | pair("base_model.model.model.unembed_tokens")
    write(tmp_path, tensors, target_modules=None)
    convert_adapter(tmp_path, base_model="org/model", rank=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "q_proj"]
    assert config["base_model_name_or_path"] == "org/model"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 32, "LORA")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(found) == sorted(
        pair(f"{LAYER}.self_attn.q_proj") | pair("base_model.model.lm_head")
    )


def test_experts_in_one_tensor_become_one_each(tmp_path: Path) -> None:
    shared = torch.ones(1, 2, 4)
    each = torch.stack([torch.full((3, 2), float(number)) for number in range(3)])
    name = f"{LAYER}.mlp.experts.w2"
    write(tmp_path, {f"{name}.lora_A.weight": shared, f"{name}.lora_B.weight": each})
    convert_adapter(tmp_path, base_model="m", rank=2)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert len(found) == 6
    for number in range(3):
        base = f"{LAYER}.mlp.experts.{number}.down_proj"
        assert torch.equal(found[f"{base}.lora_A.weight"], shared[0])
        assert torch.equal(found[f"{base}.lora_B.weight"], each[number])


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({"model.layers.0.weight": torch.ones(2, 2)}, {}, "does not know"),
        ({f"{LAYER}.x.lora_A.weight": torch.ones(2)}, {}, "shape"),
        (pair(f"{LAYER}.mlp.up_proj"), {"r": 8}, "rank 8"),
        (pair(f"{LAYER}.mlp.up_proj"), {"r": None}, "rank None"),
    ],
)
def test_what_peft_would_not_load_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], said: str
) -> None:
    write(tmp_path, tensors, **config)
    with pytest.raises(FatalJobError, match=said):
        convert_adapter(tmp_path, base_model="m", rank=2)


def test_an_archive_gives_its_two_files_and_nothing_else(tmp_path: Path) -> None:
    files = {
        "./adapter_config.json": b"{}",
        "run/adapter_model.safetensors": b"weights",
        "../outside": b"x",
        "optimizer.bin": b"y",
    }
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    folder = tmp_path / "inside"
    folder.mkdir()
    unpack(archive, folder)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {
        "archive": archive.read_bytes(),
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
    }


def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(b"not at all")
    with pytest.raises(FatalJobError, match="no archive"):
        unpack(archive, tmp_path)
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("adapter_config.json"))
    with pytest.raises(FatalJobError, match=r"no adapter_model\.safetensors"):
        unpack(archive, tmp_path)
