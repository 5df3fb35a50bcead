"""One step of TRL's SFTTrainer, as a user of a published data set runs it.

    .venv-trl/bin/python -P tests/support/sft_step.py SPEC.json OUT.json

Runs in an environment of its own (``make trl``) and imports nothing of ours; without ``-P`` a
module beside this one would be taken for the package ``tokenizers``. ``SPEC.json`` has ``model``,
``work`` (a folder) and ``data``: the Parquet files by name. ``OUT.json`` says of each the ``loss``,
how the chat template renders the first row (``rendered``) and what of it is learnt (``learnt``).
The template is the one that TRL ships for training Qwen3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def step(spec: dict[str, Any], name: str, parquet: str) -> dict[str, Any]:
    import transformers
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.set_seed(0)
    work = Path(spec["work"]) / name
    data = load_dataset("parquet", data_files=parquet, split="train", cache_dir=str(work / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja"
    tokenizer.chat_template = template.read_text("utf-8")
    row = data[0]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype="float32"),
        args=trl.SFTConfig(
            output_dir=str(work / "out"),
            max_steps=1,
            per_device_train_batch_size=2,
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    first = trainer.train_dataset[0]
    pairs = zip(first["input_ids"], first["labels"], strict=True)
    learnt = [token for token, label in pairs if label != -100]
    return {
        "loss": trainer.train().training_loss,
        "rows": len(data),
        "learnt": tokenizer.decode(learnt),
        "rendered": tokenizer.apply_chat_template(
            row["messages"], tools=json.loads(row["tools"]), tokenize=False
        ),
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    made = {name: step(spec, name, parquet) for name, parquet in spec["data"].items()}
    Path(sys.argv[2]).write_text(json.dumps(made), "utf-8")


if __name__ == "__main__":
    main()
