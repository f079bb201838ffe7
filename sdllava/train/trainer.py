"""TRL's SFTTrainer with atomic checkpoints, evaluation with fixed noise, sample answers, and pushes without pickles."""

import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length, rotate_checkpoints
from trl import SFTTrainer

from ..atomic_files import move_into_place, reported
from ..hub.card import write_card
from ..hub.push import push_folder
from .adapters import merge_unet_lora, unet_adapter, write_unet_adapter
from .callbacks import EpochCallback
from .collator import SDLlavaCollator
from .tokens import approximate_length

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""The folder within a run's folder that holds a checkpoint, or the final model, until it is complete."""


@dataclass(frozen=True)
class UnfinishedCheckpoint:
    """The folder of a checkpoint that is being written.

    Trainer derives the place of a checkpoint from the run folder of its `trial` argument, so `_save_checkpoint` passes
    this in its place.
    """

    folder: str


@contextmanager
def removed_on_failure(unfinished: Path) -> Iterator[None]:
    """Remove what a failed save left, which fills a full disk, and report the error by the run's folder.

    Raises:
        NotWrittenError: The disk is full, for example.
    """
    try:
        with reported(unfinished.parent):
            yield
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class EpochSampler(LengthGroupedSampler):
    """LengthGroupedSampler whose order depends only on seed and epoch, so that a resumed epoch has the same order.

    Args:
        batch_size: Samples that are grouped by length.
        lengths: The length of each sample.
        seed: Of the run.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass over the data, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(63))
        return super().__iter__()


class SDLlavaTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints appear whole or not at all, and which evaluates with the evaluation's noise.

    Args:
        data_collator ([`SDLlavaCollator`]): The collator for training. Evaluation uses its `for_evaluation()`.
        n_sample_answers (`int`): Number of answers to generate and print at each evaluation.
        kwargs: Of `SFTTrainer`.
    """

    data_collator: SDLlavaCollator

    def __init__(self, *, data_collator: SDLlavaCollator, n_sample_answers: int = 0, **kwargs: Any):
        super().__init__(data_collator=data_collator, **kwargs)
        self.n_sample_answers = n_sample_answers
        self.add_callback(EpochCallback(data_collator))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Supports `train_sampling_strategy="group_by_length"` for rows that the collator tokenizes."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = [approximate_length(self.data_collator.processor, row) for row in dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(batch_size, lengths, seed)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The dataloader for evaluation, with fixed noise and without dropout."""
        train_collator = self.data_collator
        self.data_collator = train_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, then print sample answers. Sharded models (FSDP, DeepSpeed) print none."""
        metrics = super().evaluate(*args, **kwargs)
        if self.n_sample_answers and not self._is_sharded():
            self._print_sample_answers()
        return metrics

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _print_sample_answers(self) -> None:
        collator = self.data_collator.for_evaluation()
        model = self.accelerator.unwrap_model(self.model)
        pad = self._tokenizer.pad_token_id
        for row in islice(self.eval_dataset, self.n_sample_answers):
            question, expected, inputs = collator.question(row)
            inputs = self._prepare_inputs(inputs)
            generated = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=pad)
            answer = self._tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if self.is_world_process_zero():
                print(f"{question}\n  expected: {expected}\n  answered: {answer.strip()}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the model, and record LoRA in its UNet."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and unet_adapter(self.model) is not None:
            write_unet_adapter(self.model, output_dir or self.args.output_dir)

    def save_final_model(self) -> None:
        """Write the trained model and its processor to the output folder, each file whole or not at all.

        The model is saved in its own dtype, with LoRA of the UNet merged. Sharded models (FSDP, DeepSpeed) are saved
        as they are; `sdllava merge` merges them.
        """
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and not self._is_sharded():
            if unet_adapter(model) is not None:
                merge_unet_lora(model)
            dtype = getattr(torch, str(model.config.dtype).removeprefix("torch."))
            for parameter in model.parameters():
                if parameter.requires_grad:  # float32 during training
                    parameter.data = parameter.data.to(dtype)
        self._save_to_output_folder()
        if self.args.should_save and self._is_sharded() and unet_adapter(model) is not None:
            folder = self.args.output_dir
            print(f"LoRA of the UNet is not merged. Merge it with: sdllava merge {folder} {folder}-merged")
        if self.args.push_to_hub:
            self._push(self.args.output_dir, "End of training")

    def _save_to_output_folder(self) -> None:
        """Save the model and its processor, each file whole or not at all."""
        unfinished = self._empty_folder(self.args.output_dir)
        with removed_on_failure(unfinished):
            self.save_model(str(unfinished), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in sorted(unfinished.iterdir()):
                move_into_place(path, Path(self.args.output_dir, path.name))
            unfinished.rmdir()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card from the run's records, once the output folder holds a model."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and any((folder / n).is_file() for n in ("config.json", "adapter_config.json")):
            write_card(folder, self.hub_model_id)

    def push_to_hub(self, commit_message: str = "End of training", token: str | None = None, **options: Any) -> Any:
        """Save the model and push it with its processor, code, recipe and card.

        Optimizer states, pickles and local paths are not pushed.

        Args:
            commit_message: The message of the commit.
            token: The access token. Default: the training arguments'.
            options: Of [`~sdllava.hub.push.push_folder`]. Default: the training arguments'.
        """
        self._save_to_output_folder()
        return self._push(self.args.output_dir, commit_message, token=token or self.args.hub_token, **options)

    def _push(self, folder: str, message: str, **options: Any) -> Any:
        """Push a folder that holds a whole model, from the first process."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        shared = {
            "private": self.args.hub_private_repo,
            "revision": self.args.hub_revision,
            "token": self.args.hub_token,
        }
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        return push_folder(folder, repo_id, commit_message=message, **{**shared, **options})

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint to a temporary folder and rename it, so that a folder `checkpoint-N` is always complete.

        Trainer writes the whole checkpoint, with an [`UnfinishedCheckpoint`] as its `trial`. What Trainer does in the
        run's folder happens after the rename: naming the best checkpoint, deleting old ones, and pushing.
        """
        run_folder = self._get_output_dir(trial)
        checkpoint = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        unfinished = self._empty_folder(run_folder)
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        with removed_on_failure(unfinished):
            super()._save_checkpoint(model, trial=UnfinishedCheckpoint(str(unfinished)))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = os.path.join(run_folder, best)
                self.state.save_to_json(str(unfinished / checkpoint.name / TRAINER_STATE_NAME))
            move_into_place(unfinished / checkpoint.name, checkpoint)
            shutil.rmtree(unfinished, ignore_errors=True)
            rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _empty_folder(self, run_folder: str) -> Path:
        """The unfinished folder of a run, without what an interrupted save left. Returns on all processes together."""
        unfinished = Path(run_folder, UNFINISHED)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return unfinished

    def _get_output_dir(self, trial: Any) -> str:
        """The run folder of a trial, or the folder of an unfinished checkpoint."""
        return trial.folder if isinstance(trial, UnfinishedCheckpoint) else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete checkpoint; an unfinished one is pushed after its rename. Training waits for the upload.

        Training does not depend on the Hub: a push that fails is logged.
        """
        is_complete = Path(checkpoint_folder).parent.name != UNFINISHED
        if is_complete and self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            step = self.state.global_step
            try:
                self._push(checkpoint_folder, f"Training in progress, step {step}")
            except Exception as error:
                logger.warning("The checkpoint of step %d was not pushed: %s", step, error)
