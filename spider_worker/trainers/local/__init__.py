"""The student in this process: torch, transformers, and a LoRA adapter by peft."""

from spider_worker.trainers.local.trainer import TRAINER_PARAMETERS, LocalTrainer, check_parameters

__all__ = ["TRAINER_PARAMETERS", "LocalTrainer", "check_parameters"]
