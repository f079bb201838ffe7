"""Samples to batches: text with its labels, images, the diffusion model's prompts, and the seeds of its noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from transformers.utils import logging

from ..data.images import open_image
from ..data.prompts import PromptOptions, noise_seeds, pseudo_caption, training_prompts
from ..data.records import IMAGE_MARKER, Message, Record, RecordError, sample_key, strip_markers, to_record
from .cache import FeatureCache, image_key
from .tokens import IGNORED, Tokens, tokenize_record

if TYPE_CHECKING:
    from ..processors import SDLlavaProcessor

logger = logging.get_logger(__name__)


AT_LEAST_SAMPLES = 1000
"""The share of skipped samples is taken of at least this many, so that the first bad sample does not end a run."""


def _shared_counter() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()  # so that changes reach worker processes, and theirs ours


@dataclass
class SDLlavaCollator:
    """Makes a batch of rows with `images` and `messages` (or `prompt` and `completion`, or LLaVA's `conversations`).

    Args:
        processor ([`SDLlavaProcessor`]): The processor of the model.
        prompts ([`PromptOptions`]): How the diffusion model's prompts are made.
        template (`str`): A chat template with generation markers. Default: the processor's.
        seed (`int`): Determines every random choice, together with the epoch ([`set_epoch`]) and the sample, so that a
            resumed run equals an uninterrupted one. Without it, noise and prompts are drawn again at each use of a
            sample, from torch's random generator, and the epoch is not needed.
        max_length (`int`): Number of tokens to keep of a sample. None keeps all.
        require_images (`bool`): Whether a sample without an image is an error, as in stage 1, where it would train
            nothing.
        skip_bad_samples (`bool`): Whether an unusable sample is named in a warning and contributes no loss. Otherwise
            it raises `ValueError`.
        fixed_noise (`bool`): Use the configuration's noise map, as in evaluation, instead of one per sample.
        cache ([`FeatureCache`]): Cached features of the frozen parts.
        max_bad_samples (`float`): With `skip_bad_samples`, the largest share of samples that are skipped, of those so
            far and of at least 1,000. More raise `ValueError`.
    """

    processor: "SDLlavaProcessor"
    prompts: PromptOptions = field(default_factory=PromptOptions)
    template: str | None = None
    seed: int | None = None
    max_length: int | None = None
    require_images: bool = False
    skip_bad_samples: bool = False
    fixed_noise: bool = False
    cache: FeatureCache | None = None
    max_bad_samples: float = 0.01
    _epoch: torch.Tensor = field(default_factory=_shared_counter, repr=False)
    _seen: torch.Tensor = field(default_factory=_shared_counter, repr=False)
    _skipped: torch.Tensor = field(default_factory=_shared_counter, repr=False)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass over the data, from 0. Rows with an `epoch` of their own keep it."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "SDLlavaCollator":
        """A copy for evaluation: fixed noise, no dropout, the last question, and no cache."""
        source = "caption" if self.prompts.source == "noisy_caption" else self.prompts.source
        prompts = replace(self.prompts, source=source, question="last", dropout=0.0)
        return replace(self, prompts=prompts, fixed_noise=True, cache=None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` of shape `(batch, sequence)`, padded on the right; with
            one row per image, `pixel_values`, `diffusion_pixel_values` and `diffusion_input_ids` (for SDXL also
            `diffusion_input_ids_2`) as the model needs them; `diffusion_noise_seed` of shape `(n_images,)` in
            training, and `image_encodings` from a cache.

        Raises:
            ValueError: A sample is not usable, and `skip_bad_samples` is off, or too many are skipped; or the rows have
                no columns.
        """
        if not any(rows):
            raise ValueError(
                f"The {len(rows)} rows of this batch have no columns. Trainer removed them, because the model does not "
                "read them itself. Set remove_unused_columns=False in TrainingArguments."
            )
        samples = [self._sample(row, number) for number, row in enumerate(rows)]
        batch: dict[str, Any] = self._pad([sample.tokens for sample in samples])
        prompts = [prompt for sample in samples for prompt in sample.prompts]
        if prompts:
            images = [image for sample in samples for image in sample.images]
            keys = [key for sample in samples for key in sample.keys]
            batch.update(self._image_inputs(images, keys, prompts))
            if self._has_diffusion() and not self.fixed_noise:
                batch["diffusion_noise_seed"] = torch.tensor([seed for sample in samples for seed in sample.noise])
        return batch

    def record(self, row: Mapping[str, Any], number: int = 0) -> Record:
        """The record of a row.

        Args:
            row: A row of the data.
            number: Its position in the batch or the data, for error messages.

        Raises:
            RecordError: The row is not a sample, or lacks an image or a pseudo-caption that the run needs.
        """
        if row.get("error"):
            raise RecordError(row["error"])
        record = to_record(dict(row), row.get("name") or f"sample {number} of a batch", row.get("folder"))
        if self.require_images and not record["images"]:
            raise RecordError("has no image, which stage align needs")
        for image in record["images"]:
            pseudo_caption(image, self.prompts.pseudo_captions)
        return record

    def tokens(self, record: Record) -> Tokens:
        """The token ids and labels of a record.

        Raises:
            RecordError: Its image placeholders do not fit, or it has no supervised token.
        """
        return tokenize_record(self.processor, record, self.template, self.max_length)

    def question(self, row: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
        """The first question of a row, its answer, and the model's inputs for the question."""
        record = self.record(row)
        turn = next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
        messages = record["messages"][: turn + 1]
        images = record["images"][: sum(message["content"].count(IMAGE_MARKER) for message in messages)]
        batch = self([{**record, "messages": messages, "images": images, "supervised_from": 0}])
        start = int((batch["labels"][0] != IGNORED).nonzero()[0])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inputs |= {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
        expected = record["messages"][turn]["content"]
        return strip_markers(record["messages"][turn - 1]["content"]), expected, inputs

    def _sample(self, row: Mapping[str, Any], number: int) -> "_Sample":
        self._seen += 1
        try:
            record = self.record(row, number)
            tokens = self.tokens(record)
            seed, epoch = self._seed_and_epoch(row)
            key = sample_key(record)
            prompts = training_prompts(record, self.prompts, seed, epoch, key)
            noise = noise_seeds(seed, epoch, key, len(record["images"]))
            folder = record["folder"]
            keys = [
                self._cache_key(image, prompt, folder) for image, prompt in zip(record["images"], prompts, strict=True)
            ]
            images = [open_image(image, folder) for image in record["images"]] if self.needs_images() else []
        except RecordError as error:
            name = row.get("name") or f"sample {number} of a batch"
            if not self.skip_bad_samples:
                raise ValueError(f"{name} {error}") from error
            logger.warning_once(f"Skipped: {name} {error}")
            self._skipped += 1
            self.check_skipped(int(self._skipped), int(self._seen))
            return self._blank()
        return _Sample(tokens, images, keys, prompts, noise)

    def _seed_and_epoch(self, row: Mapping[str, Any]) -> tuple[int, int]:
        if self.seed is None:
            return int(torch.randint(2**63 - 1, ())), 0
        return self.seed, int(self._epoch if row.get("epoch") is None else row["epoch"])

    def check_skipped(self, skipped: int, seen: int) -> None:
        """Check the number of skipped samples against `max_bad_samples`.

        Args:
            skipped: The number of skipped samples.
            seen: The number of all samples so far.

        Raises:
            ValueError: They are too many.
        """
        if skipped > self.max_bad_samples * max(seen, AT_LEAST_SAMPLES):
            raise ValueError(
                f"{skipped} of {seen} samples were skipped because they cannot be used, more than "
                f"{self.max_bad_samples:.2%}. List them with --check_data true and correct them, or raise "
                "max_bad_samples."
            )

    def _blank(self) -> "_Sample":
        """A replacement for an unusable sample: a grey image and no supervised token."""
        messages = [Message(role="user", content=IMAGE_MARKER), Message(role="assistant", content=".")]
        record = Record(name="blank", images=["blank"], messages=messages, supervised_from=0, folder=None)
        ids = tokenize_record(self.processor, record, self.template).input_ids
        images = [PIL.Image.new("RGB", (64, 64), (127, 127, 127))] if self.needs_images() else []
        return _Sample(Tokens(ids, [IGNORED] * len(ids)), images, [None], [""], [0])

    def _pad(self, samples: list[Tokens]) -> dict[str, torch.Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        tokenizer: Any = self.processor.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        padding = [length - len(sample.input_ids) for sample in samples]
        padded = list(zip(samples, padding, strict=True))
        return {
            "input_ids": torch.tensor([sample.input_ids + [pad] * n for sample, n in padded]),
            "attention_mask": torch.tensor([[1] * (length - n) + [0] * n for n in padding]),
            "labels": torch.tensor([sample.labels + [IGNORED] * n for sample, n in padded]),
        }

    def _image_inputs(self, images: list[Any], keys: list[str | None], prompts: list[str]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if images:
            inputs.update(self.processor(images=images, return_tensors="pt"))
        if self._has_diffusion() and self.prompts.source != "none":
            inputs.update(self.processor.tokenize_questions(prompts, return_tensors="pt"))
        if self.cache is not None:
            inputs.pop("diffusion_pixel_values", None)
            inputs["image_encodings"] = self._cached(self.cache, keys)
        return inputs

    def _cached(self, cache: FeatureCache, keys: list[str | None]) -> dict[str, torch.Tensor]:
        found = [cache.blank() if key is None else cache.read(key) for key in keys]
        tensors = {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}
        if "latents" not in tensors and "conditional_features" not in tensors:
            tensors["conditional_features"] = tensors["unconditional_features"]  # the prompt is empty: X_c is X_u
        return tensors

    def _cache_key(self, image: Any, prompt: str, folder: str | None) -> str | None:
        if self.cache is None:
            return None
        key = image_key(image, prompt if self.cache.kind == "conditional" else None)
        if key not in self.cache:
            name = image.get("path") if isinstance(image, dict) else image
            raise RecordError(
                f"has the image {name!r}, which the feature cache {str(self.cache.folder)!r} does not hold"
            )
        self.cache.require_same_file(key, image, folder)
        return key

    def needs_images(self) -> bool:
        """Whether image files are read, which a cache of all features replaces."""
        if self.cache is None:
            return True
        return self.cache.kind == "latents" and hasattr(self.processor, "image_processor")

    def _has_diffusion(self) -> bool:
        return hasattr(self.processor, "diffusion_image_processor")


@dataclass
class _Sample:
    tokens: Tokens
    images: list[Any]
    keys: list[str | None]
    prompts: list[str]
    noise: list[int]
