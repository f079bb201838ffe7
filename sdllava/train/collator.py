"""Samples to batches: text with its labels, images, the diffusion model's prompts, and the noise it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..data.images import open_image
from ..data.prompts import PromptOptions, noise_seeds, pseudo_caption, training_prompts
from ..data.records import Message, Record, RecordError, sample_key, strip_markers, to_record
from .cache import FeatureCache, image_key
from .tokens import IGNORED, Tokens, tokenize_record

if TYPE_CHECKING:
    from ..processors import SDLlavaProcessor

logger = logging.get_logger(__name__)

PROMPT_INPUTS = ("diffusion_input_ids", "diffusion_input_ids_2")


def _shared_epoch() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes see it change


@dataclass
class SDLlavaCollator:
    """Makes a batch of rows with `images` and `messages` (or `prompt` and `completion`, or LLaVA's `conversations`).

    Args:
        processor ([`SDLlavaProcessor`])
        prompts ([`PromptOptions`]): what the diffusion model is asked.
        template (`str`): a chat template with generation markers; default the processor's.
        seed (`int`): with the epoch and the sample it settles every random choice.
        max_length (`int`): tokens kept of a sample; None keeps all.
        require_images (`bool`): a sample without an image is bad, as in stage 1, where it would train nothing.
        skip_bad_samples (`bool`): a sample that cannot be used is named in a warning and contributes no loss; else it
            raises ValueError.
        fixed_noise (`bool`): the configuration's noise map, as in evaluation, instead of one for each sample.
        cache ([`FeatureCache`]): stands in for what is frozen.
    """

    processor: "SDLlavaProcessor"
    prompts: PromptOptions = field(default_factory=PromptOptions)
    template: str | None = None
    seed: int = 0
    max_length: int | None = None
    require_images: bool = False
    skip_bad_samples: bool = False
    fixed_noise: bool = False
    cache: FeatureCache | None = None
    _epoch: torch.Tensor = field(default_factory=_shared_epoch, repr=False)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data this is, from 0; rows with an `epoch` of their own know it themselves."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "SDLlavaCollator":
        """The same with evaluation's noise, no dropout, the last question, and everything computed."""
        source = "caption" if self.prompts.source == "noisy_caption" else self.prompts.source
        prompts = replace(self.prompts, source=source, question="last", dropout=0.0)
        return replace(self, prompts=prompts, fixed_noise=True, cache=None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns:
        `dict`: `input_ids`, `attention_mask`, `labels` `(batch, sequence)`, padded on the right; one row an image
        of `pixel_values`, `diffusion_pixel_values`, `diffusion_input_ids` (and `_2`) as the model needs them,
        `diffusion_noise_seed` `(n,)` in training, and `image_encodings` from a cache.
        """
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
        """The record of a row. Raises RecordError."""
        if row.get("error"):
            raise RecordError(row["error"])
        record = to_record(dict(row), row.get("name") or f"sample {number} of a batch", row.get("folder"))
        if self.require_images and not record["images"]:
            raise RecordError("has no image, without which stage align trains nothing")
        for image in record["images"]:
            pseudo_caption(image, self.prompts.pseudo_captions)
        return record

    def tokens(self, record: Record) -> Tokens:
        """Token ids and labels of a record. Raises RecordError."""
        return tokenize_record(self.processor, record, self.template, self.max_length)

    def question(self, row: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
        """The first question of a row, its answer, and the inputs that ask it, for showing sample answers."""
        record = self.record(row)
        turn = next(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
        asked = Record(**{**record, "messages": record["messages"][: turn + 1], "supervised_from": 0})
        asked["images"] = record["images"][: sum(m["content"].count("<image>") for m in asked["messages"])]
        batch = self([asked])
        start = int((batch["labels"][0] != IGNORED).nonzero()[0])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inputs |= {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
        expected = record["messages"][turn]["content"]
        return strip_markers(record["messages"][turn - 1]["content"]), expected, inputs

    def _sample(self, row: Mapping[str, Any], number: int) -> "_Sample":
        try:
            record = self.record(row, number)
            tokens = self.tokens(record)
            epoch = int(self._epoch if row.get("epoch") is None else row["epoch"])
            key = sample_key(record)
            prompts = training_prompts(record, self.prompts, self.seed, epoch, key)
            noise = noise_seeds(self.seed, epoch, key, len(record["images"]))
            keys = [self._cache_key(image, prompt) for image, prompt in zip(record["images"], prompts, strict=True)]
            images = [open_image(image, record["folder"]) for image in record["images"]] if self._needs_images() else []
        except RecordError as error:
            name = row.get("name") or f"sample {number} of a batch"
            if not self.skip_bad_samples:
                raise ValueError(f"{name} {error}") from error
            logger.warning_once(f"skipped: {name} {error}")
            return self._blank()
        return _Sample(tokens, images, keys, prompts, noise)

    def _blank(self) -> "_Sample":
        """What stands in for a bad sample: a grey image and no supervised token."""
        import PIL.Image

        messages = [Message(role="user", content="<image>"), Message(role="assistant", content=".")]
        record = Record(name="blank", images=["blank"], messages=messages, supervised_from=0, folder=None)
        ids = tokenize_record(self.processor, record, self.template).input_ids
        images = [PIL.Image.new("RGB", (64, 64), (127, 127, 127))] if self._needs_images() else []
        return _Sample(Tokens(ids, [IGNORED] * len(ids)), images, [None], [""], [0])

    def _pad(self, samples: list[Tokens]) -> dict[str, torch.Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        pad = self.processor.tokenizer.pad_token_id
        pad = self.processor.tokenizer.eos_token_id if pad is None else pad
        lengths = [len(sample.input_ids) for sample in samples]
        return {
            "input_ids": torch.tensor([s.input_ids + [pad] * (length - n) for s, n in zip(samples, lengths)]),
            "attention_mask": torch.tensor([[1] * n + [0] * (length - n) for n in lengths]),
            "labels": torch.tensor([s.labels + [IGNORED] * (length - n) for s, n in zip(samples, lengths)]),
        }

    def _image_inputs(self, images: list[Any], keys: list[str | None], prompts: list[str]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if images:
            inputs.update(self.processor(images=images, return_tensors="pt"))
        if self._has_diffusion() and self.prompts.source != "none":
            inputs.update(self.processor.tokenize_questions(prompts, return_tensors="pt"))
        if self.cache is not None:
            inputs.pop("diffusion_pixel_values", None)
            inputs["image_encodings"] = self._cached(keys)
        return inputs

    def _cached(self, keys: list[str | None]) -> dict[str, torch.Tensor]:
        found = [self.cache.blank() if key is None else self.cache.read(key) for key in keys]
        tensors = {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}
        if "latents" not in tensors and "conditional_features" not in tensors:
            tensors["conditional_features"] = tensors["unconditional_features"]  # the prompt is empty: X_c is X_u
        return tensors

    def _cache_key(self, image: Any, prompt: str) -> str | None:
        if self.cache is None:
            return None
        key = image_key(image, prompt if self.cache.kind == "conditional" else None)
        if key not in self.cache:
            name = image.get("path") if isinstance(image, dict) else image
            raise RecordError(f"has the image {name!r}, which the feature cache {self.cache.folder} does not hold")
        return key

    def _needs_images(self) -> bool:
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
