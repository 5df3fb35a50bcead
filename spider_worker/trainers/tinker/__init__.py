"""The student at Tinker, or at a server that speaks its protocol."""

from spider_worker.trainers.tinker.parameters import TRAINER_PARAMETERS, check_parameters
from spider_worker.trainers.tinker.trainer import TinkerTrainer

__all__ = ["TRAINER_PARAMETERS", "TinkerTrainer", "check_parameters"]
