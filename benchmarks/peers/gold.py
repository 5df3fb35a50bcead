"""TRL's on-policy distillation trainer (GOLD), as the on-policy benchmarks run it.

    .venv-trl/bin/python benchmarks/peers/gold.py SPEC.json OUT.json

Runs in an environment of its own (``make trl``) and imports nothing of ours. ``SPEC.json``
is what ``bench_onpolicy`` writes for both sides; ``gold`` in it holds what is GOLD's own. A step's
time is from its end to the next one's end, so that sampling, scoring and training count, and so
does whatever the trainer does between them.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    torch.set_num_threads(spec["threads"])
    transformers.set_seed(spec["seed"])
    ends: list[tuple[float, float]] = []  # wall, CPU
    tokens: list[int] = []

    class Counted(GOLDTrainer):  # type: ignore[misc]
        """Counts the tokens that the student sampled. Its learning rate falls towards the end of
        the token budget where ``schedule`` is ``linear``: the trainer's own falls towards the
        end of the data, which is further away."""

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if spec["schedule"] == "constant":
                return super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda _: max(0.0, 1 - sum(tokens) / spec["token_budget"]),
            )
            return self.lr_scheduler

        def generate_on_policy_outputs(self, *args: Any, **options: Any) -> Any:
            made = super().generate_on_policy_outputs(*args, **options)
            tokens.append(int((made[2] != -100).sum()))
            return made

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))
            if spec["token_budget"] is not None and sum(tokens) >= spec["token_budget"]:
                control.should_training_stop = True

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(spec[name], dtype=torch.float32)

    lines = Path(spec["prompts"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["question"] for line in lines]
    data = Dataset.from_list(
        [
            # On-policy training samples its own answers; the trainer asks for one all the same.
            {"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": "-"}]}
            for row in rows
        ]
    )
    batch = spec["prompts_a_step"] * spec["samples"]
    config = GOLDConfig(
        output_dir=str(folder),
        use_uld_loss=True,
        lmbda=1.0,
        teacher_tokenizer_name_or_path=spec["teacher"],
        temperature=1.0,
        top_p=1.0,
        max_completion_length=spec["max_tokens"],
        max_length=512,
        num_generations=spec["samples"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_train_epochs=spec["epochs"],
        dataloader_drop_last=True,
        # What would only slow it down on a CPU with these models.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=10_000,
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        **spec["gold"],
    )
    trainer = Counted(
        model=load("student"),
        teacher_model=load("teacher"),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(spec["student"]),
        peft_config=LoraConfig(
            r=spec["lora_rank"],
            lora_alpha=spec["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    adapter = folder / "adapter"
    trainer.model.save_pretrained(adapter)
    return {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seconds": [b[0] - a[0] for a, b in itertools.pairwise(ends)],
        "cpu": [b[1] - a[1] for a, b in itertools.pairwise(ends)],
        "tokens": tokens[1:],
        "tokens_total": sum(tokens),
        "adapter": str(adapter),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    out.write_text(json.dumps(run(spec, out.with_suffix(".run"))), encoding="utf-8")


if __name__ == "__main__":
    main()
