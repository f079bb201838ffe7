"""What a run records for its model card: recipe, hyper-parameters, hardware, time."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..hub.records import TRAINING_FILE, record_training

HYPERPARAMETERS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
)
"""The fields of SFTConfig that are recorded."""


class TrainingRecord(TrainerCallback):
    """Writes `training.json` at every checkpoint and at the end, its seconds those of all sessions of the run.

    Args:
        settings (`dict`): the run's model, adapter and data arguments, as JSON values.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.earlier_seconds = 0.0
        self.begin = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.monotonic()
        path = Path(args.output_dir, TRAINING_FILE)
        if state.global_step and path.is_file():
            self.earlier_seconds = json.loads(path.read_text(encoding="utf-8"))["stages"][-1]["seconds"]

    def on_save(self, args, state, control, **kwargs):
        """Write the record into the run's folder whenever a checkpoint is saved, with the time so far."""
        if state.is_world_process_zero:
            hyperparameters = {name: getattr(args, name) for name in HYPERPARAMETERS}
            hyperparameters["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            hyperparameters["optim"] = getattr(args.optim, "value", args.optim)
            record_training(
                args.output_dir,
                stage=self.settings["stage"],
                settings={**self.settings, **hyperparameters},
                seconds=self.earlier_seconds + time.monotonic() - self.begin,
                steps=state.global_step,
                processes=args.world_size,
            )

    on_train_end = on_save
