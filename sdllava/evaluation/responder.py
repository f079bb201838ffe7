"""A model and its processor as something that answers samples: any image-text-to-text model of transformers."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from .benchmarks.base import Sample, blank_image, open_image
from .processes import default_device


def load_model(name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None):
    """A model, in evaluation mode, and its processor; `mini` is the embedded miniature.

    Args:
        name: a folder or Hub id of this package's models, or of any image-text-to-text model of transformers.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: for example "cuda:1"; None takes this process's accelerator, or the CPU.

    Raises:
        ValueError: the dtype has no such name, or the device is not there or too small.
        OSError: there is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import sdllava

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"The dtype is auto, float32, bfloat16 or float16, not {dtype!r}.")
    sdllava.register()  # the command line puts this off until a model is needed
    path = str(sdllava.mini_path()) if name == "mini" else name
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, revision=revision, dtype=dtype)
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"The model {name!r} could not be loaded: {' '.join(str(error).split())}") from error
    try:
        return model.to(device or default_device()).eval(), processor
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"The model {name!r} cannot be put on {device or default_device()}: {error}") from error


def has_diffusion(model) -> bool:
    return getattr(model.config, "diffusion_config", None) is not None


class Prepared(NamedTuple):
    """Samples as a processor gives them, on the CPU, and their images in order."""

    images: list[Image.Image]
    inputs: dict[str, Any]


class Responder:
    """Answers batches of samples.

    Args:
        model, processor: any image-text-to-text pair of transformers.
        template: "chat" (the processor's chat template, images first) or "plain" (image tokens, then the prompt).
        guidance_scales: the diffusion tower's, instead of the checkpoint's own.

    Raises:
        ValueError: guidance scales for a model without a diffusion tower, or another number of them than it has.
    """

    def __init__(self, model, processor, template: str = "chat", guidance_scales: Sequence[float] | None = None):
        self.model, self.processor, self.template = model, processor, template
        self.diffusion = has_diffusion(model)
        if guidance_scales is not None and not self.diffusion:
            raise ValueError("--guidance is for models with a diffusion tower; this model has none.")
        if guidance_scales is not None:
            own = model.config.diffusion_config.guidance_scales
            if len(guidance_scales) != len(own):
                raise ValueError(f"--guidance takes {len(own)} scale(s) for this model, not {len(guidance_scales)}.")
        self.guidance_scales = None if guidance_scales is None else [float(scale) for scale in guidance_scales]
        self.kept = None
        if hasattr(model, "encode_images"):
            from ..pipeline import KeptEncodings

            self.kept = KeptEncodings(model)
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self._decoder = copy.deepcopy(tokenizer)  # one tokenizer must not read in one thread while it writes in another

    def text(self, sample: Sample) -> str:
        """The prompt as the language model gets it, image tokens not yet expanded."""
        if self.template == "plain":
            return getattr(self.processor, "image_token", "<image>") * len(sample.images) + sample.prompt
        content = [{"type": "image"} for _ in sample.images] + [{"type": "text", "text": sample.prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def prepare(
        self, samples: Sequence[Sample], questions: Sequence[Sequence[str]] | None = None, blind: bool = False
    ) -> Prepared:
        """What does not need the model; `questions` are the diffusion prompts, one per image of each sample."""
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
        """Left-padded inputs on the model's device, images encoded where they are kept."""
        given = {
            # the VAE wants float32 pixels whatever the language model's dtype
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
        """One reply per sample, special tokens and outer blanks removed.

        Args:
            prepared: from `prepare` of the same samples, where that was done ahead.
        """
        inputs = self.inputs(prepared or self.prepare(samples, questions, blind))
        if self.guidance_scales is not None:
            inputs["diffusion_guidance_scales"] = self.guidance_scales
        output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **generation)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._decoder.batch_decode(new, skip_special_tokens=True)]


def images_of(sample: Sample, blind: bool = False) -> list[Image.Image]:
    names = sample.image_ids or (sample.id,) * len(sample.images)
    images = [open_image(source, name) for source, name in zip(sample.images, names, strict=True)]
    return [blank_image(image) for image in images] if blind else images
