"""Trainer callbacks: the epoch for the collator's random choices, and the training record for the model card."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.records import TRAINING_FILE, record_training
from .collator import SDLlavaCollator

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


class EpochCallback(TrainerCallback):
    """Sets the epoch of a collator that has a seed; the plain Trainer needs it only to resume exactly.

    Args:
        collator: The collator of the training data.
    """

    def __init__(self, collator: SDLlavaCollator):
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the number of the epoch that begins, from 0."""
        self.collator.set_epoch(int(state.epoch or 0))


class TrainingRecordCallback(TrainerCallback):
    """Writes `training.json` for the model card at every checkpoint and at the end of training.

    The recorded time is the sum over all sessions of a run that was resumed.

    Args:
        settings: The run's model, adapter and data arguments, as JSON values.
    """

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.earlier_seconds = 0.0
        self.begin = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, from the time of the earlier sessions of a resumed run."""
        self.begin = time.monotonic()
        path = Path(args.output_dir, TRAINING_FILE)
        if state.global_step and path.is_file():
            self.earlier_seconds = json.loads(path.read_text(encoding="utf-8"))["stages"][-1]["seconds"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record to the output folder."""
        if not state.is_world_process_zero:
            return
        hyperparameters = {name: getattr(args, name) for name in HYPERPARAMETERS}
        for name in ("lr_scheduler_type", "optim"):
            hyperparameters[name] = getattr(hyperparameters[name], "value", hyperparameters[name])
        record_training(
            args.output_dir,
            stage=self.settings["stage"],
            settings={**self.settings, **hyperparameters},
            seconds=self.earlier_seconds + time.monotonic() - self.begin,
            steps=state.global_step,
            processes=args.world_size,
        )

    on_train_end = on_save
