"""Trains as the command does and kills itself with SIGKILL: `step:3` after a step, `save:4` within a save.

As a script: `python train_and_die.py step:3 ARGUMENTS`.
"""

import os
import signal
import sys
from collections.abc import Sequence

from transformers import TrainerCallback

from sdllava.train import run
from sdllava.train.trainer import SDLlavaTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(when: str, arguments: Sequence[str]) -> None:
    where, _, at = when.partition(":")

    class DieAfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if where == "step" and state.global_step == int(at):
                die()

    class DyingTrainer(SDLlavaTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(DieAfterStep())

        def _save_optimizer_and_scheduler(self, output_dir):
            if where == "save" and self.state.global_step == int(at):
                die()
            super()._save_optimizer_and_scheduler(output_dir)

    run.SDLlavaTrainer = DyingTrainer
    run.train(arguments)


if __name__ == "__main__":
    train_and_die(sys.argv[1], sys.argv[2:])
