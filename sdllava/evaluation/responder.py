"""Answers samples with a model and its processor: any image-text-to-text model of transformers."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import register
from ..miniature.shipped import shipped_model
from ..pipeline import CachedEncodings
from ..repositories import require_safetensors
from .benchmarks.base import Sample, blank_image, open_image
from .processes import default_device


def load_model(
    name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its processor.

    Args:
        name: Folder or Hub id of this package's models, or of any image-text-to-text model of transformers. "mini" and
            "smol" are the models that the package ships.
        revision: Branch, tag or commit on the Hub.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: For example "cuda:1". None uses this process's accelerator, or the CPU.

    Raises:
        ValueError: The dtype is unknown, the weights are pickles, or the device does not exist or is too small.
        OSError: The model does not exist or cannot be loaded.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"Unknown dtype {dtype!r}. Choose auto, float32, bfloat16 or float16.")
    register()  # the command line delays this until it needs a model
    path = shipped_model(name) or name
    require_safetensors(f"{path}@{revision}" if revision else path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, revision=revision, dtype=dtype)
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"The model {name!r} could not be loaded: {' '.join(str(error).split())}") from error
    try:
        return model.to(device or default_device()).eval(), processor
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
        raise ValueError(
            f"The model {name!r} cannot be moved to {str(device or default_device())!r}: {error}. Choose another "
            "--device."
        ) from error


def has_diffusion(model: Any) -> bool:
    """Whether a model has a diffusion tower."""
    return getattr(model.config, "diffusion_config", None) is not None


class Prepared(NamedTuple):
    """The processor's outputs for a batch of samples, on the CPU, and their images in order."""

    images: list[Image.Image]
    inputs: dict[str, Any]


class Responder:
    """Answers batches of samples.

    Args:
        model: Any image-text-to-text model of transformers.
        processor: Its processor.
        template: "chat" (the processor's chat template, images first) or "plain" (image tokens, then the prompt).
        guidance_scales: Guidance scales that replace the checkpoint's.

    Raises:
        ValueError: The model has no diffusion tower, or another number of guidance scales.
    """

    def __init__(
        self, model: Any, processor: Any, template: str = "chat", guidance_scales: Sequence[float] | None = None
    ):
        self.model, self.processor, self.template = model, processor, template
        self.diffusion = has_diffusion(model)
        if guidance_scales is not None and not self.diffusion:
            raise ValueError(
                f"--guidance {','.join(f'{scale:g}' for scale in guidance_scales)} needs a diffusion tower, which this "
                "model does not have. Leave it out."
            )
        if guidance_scales is not None:
            own = model.config.diffusion_config.guidance_scales
            if len(guidance_scales) != len(own):
                raise ValueError(
                    f"--guidance has {len(guidance_scales)} scale(s), but this model has {len(own)}. Give {len(own)}."
                )
        self.guidance_scales = None if guidance_scales is None else [float(scale) for scale in guidance_scales]
        self.kept = CachedEncodings(model) if hasattr(model, "encode_images") else None
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self._decoder = copy.deepcopy(tokenizer)  # tokenizers are not thread-safe, and one thread prepares batches

    def text(self, sample: Sample) -> str:
        """The language model's prompt, with image tokens that are not yet expanded."""
        if self.template == "plain":
            return getattr(self.processor, "image_token", "<image>") * len(sample.images) + sample.prompt
        content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def prepare(
        self, samples: Sequence[Sample], questions: Sequence[Sequence[str]] | None = None, blind: bool = False
    ) -> Prepared:
        """Run the processor, which does not need the model.

        Args:
            samples: One batch.
            questions: The diffusion model's prompts, one per image of each sample.
            blind: Whether images are replaced by grey ones.
        """
        images = [images_of(sample, blind) for sample in samples]
        texts = [self.text(sample) for sample in samples]
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False
        if self.diffusion and questions is not None:
            options["question"] = [question for group in questions for question in group]
        inputs = self.processor(images=images, text=texts, **options)
        return Prepared([image for group in images for image in group], dict(inputs))

    def inputs(self, prepared: Prepared) -> dict[str, Any]:
        """Left-padded inputs on the model's device, with cached image encodings if the model supports them."""
        given = {
            # the VAE needs float32 pixels, whatever the language model's dtype
            key: value.to(self.model.device, self.model.dtype if key == "pixel_values" else None)
            for key, value in prepared.inputs.items()
        }
        if self.kept is not None:
            self.kept.replace_pixels(prepared.images, given)
        return given

    @torch.inference_mode()
    def reply(
        self,
        samples: Sequence[Sample],
        generation: dict[str, Any],
        questions: Sequence[Sequence[str]] | None = None,
        blind: bool = False,
        prepared: Prepared | None = None,
    ) -> list[str]:
        """Generate one reply per sample, without special tokens and surrounding whitespace.

        Args:
            samples: One batch.
            generation: Arguments of `generate`.
            questions: The diffusion model's prompts, one per image of each sample.
            blind: Whether images are replaced by grey ones.
            prepared: The result of `prepare` for the same samples, if it exists already.
        """
        inputs = self.inputs(prepared or self.prepare(samples, questions, blind))
        if self.guidance_scales is not None:
            inputs["diffusion_guidance_scales"] = self.guidance_scales
        output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **generation)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._decoder.batch_decode(new, skip_special_tokens=True)]


def images_of(sample: Sample, blind: bool = False) -> list[Image.Image]:
    """The decoded images of a sample, or grey ones of the same sizes.

    Raises:
        FileNotFoundError, ValueError: An image is missing or cannot be read.
    """
    names = sample.image_ids or (sample.id,) * len(sample.images)
    images = [open_image(source, name) for source, name in zip(sample.images, names, strict=True)]
    return [blank_image(image) for image in images] if blind else images
