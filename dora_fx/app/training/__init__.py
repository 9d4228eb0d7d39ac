"""The training loop: sequences, micro-batches through pipeline stages, the optimizer, and the course of a run."""

from dora_fx.app.training.recompute import recompute_layers
from dora_fx.app.training.text_sequences import training_text, with_steps
from dora_fx.app.training.trainer import Trainer
from dora_fx.app.training.training_run import TrainingRun

__all__ = [
    "Trainer",
    "TrainingRun",
    "recompute_layers",
    "training_text",
    "with_steps",
]
