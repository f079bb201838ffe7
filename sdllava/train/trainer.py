"""TRL's SFTTrainer with what its checkpoints and evaluation need here."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, rotate_checkpoints
from trl import SFTTrainer

from ..hub.card import write_card
from ..hub.push import push_folder
from .adapters import merge_unet_lora, unet_adapter, write_unet_adapter
from .collator import SDLlavaCollator
from .tokens import tokens_about

ASIDE = ".unfinished"


class EpochCallback(TrainerCallback):
    """Tells the collator the epoch, which its random choices depend on. Also for the plain Trainer."""

    def __init__(self, collator: SDLlavaCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch))


class SDLlavaTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints appear whole or not at all, and whose evaluation uses the evaluation's noise.

    Args:
        data_collator ([`SDLlavaCollator`]): used for training; evaluation uses its `for_evaluation()`.
        n_sample_answers (`int`): answers that are generated and printed at each evaluation.
    """

    def __init__(self, *, data_collator: SDLlavaCollator, n_sample_answers: int = 0, **kwargs: Any):
        super().__init__(data_collator=data_collator, **kwargs)
        self.n_sample_answers = n_sample_answers
        self._aside: str | None = None
        self.add_callback(EpochCallback(data_collator))

    def _get_train_sampler(self, train_dataset=None):
        """Also `train_sampling_strategy="group_by_length"`, which knows no lengths of rows that are tokenized later."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = [tokens_about(self.data_collator.processor, row) for row in dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(batch_size, lengths=lengths)

    def get_eval_dataloader(self, eval_dataset=None):
        train_collator = self.data_collator
        self.data_collator = train_collator.for_evaluation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.n_sample_answers and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._print_sample_answers()
        return metrics

    def _print_sample_answers(self) -> None:
        collator = self.data_collator.for_evaluation()
        model = self.accelerator.unwrap_model(self.model)
        pad = self._tokenizer.pad_token_id
        for row, _ in zip(self.eval_dataset, range(self.n_sample_answers)):
            question, expected, inputs = collator.question(row)
            inputs = self._prepare_inputs(inputs)
            generated = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=pad)
            answer = self._tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if self.is_world_process_zero():
                print(f"{question}\n  expected: {expected}\n  answered: {answer.strip()}")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and unet_adapter(self.model) is not None:
            write_unet_adapter(self.model, output_dir or self.args.output_dir)

    def save_merged_model(self, folder: str) -> None:
        """Save the model in its own dtype, with LoRA of the UNet merged; sharded runs leave that to `sdllava merge`."""
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            if unet_adapter(model) is not None:
                merge_unet_lora(model)
            dtype = getattr(torch, str(model.config.dtype).removeprefix("torch."))
            for parameter in model.parameters():
                if parameter.requires_grad:  # held in float32 while it trained
                    parameter.data = parameter.data.to(dtype)
        self.save_model(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card from what the run recorded, once there is a model to describe."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and any((folder / n).is_file() for n in ("config.json", "adapter_config.json")):
            write_card(folder, self.hub_model_id)

    def push_to_hub(self, commit_message: str = "End of training", token: str | None = None, **options: Any) -> Any:
        """Save, and push model, processor, code, recipe and card, but no optimizer state, pickle or path of this machine.

        Args:
            options: of [`~sdllava.hub.push.push_folder`]; default what the training arguments say.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options = {"private": self.args.hub_private_repo, "revision": self.args.hub_revision, **options}
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        token = token or self.args.hub_token
        return push_folder(self.args.output_dir, repo_id, commit_message=commit_message, token=token, **options)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint aside and rename it, so that a folder named checkpoint-N is always whole."""
        run_folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = os.path.join(run_folder, ASIDE)
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = os.path.join(run_folder, best)
                self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            move_into_place(Path(aside, name), Path(run_folder, name))
            shutil.rmtree(aside, ignore_errors=True)
            rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_folder, name))


def move_files_into_place(written: Path, place: Path) -> None:
    """Flush a folder's files to the disk and move each into another folder, replacing its namesakes."""
    _flush(written)
    for path in sorted(written.iterdir()):
        os.replace(path, place / path.name) if path.is_file() else move_into_place(path, place / path.name)
    written.rmdir()


def move_into_place(written: Path, place: Path) -> None:
    """Flush what was written to the disk, then rename it, replacing what was there, which is never there in part."""
    _flush(written)
    old = written.with_name(f"{written.name}.old")
    if place.exists():
        os.replace(place, old)
    os.replace(written, place)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
