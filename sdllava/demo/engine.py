"""The computations of the demo page, without the page: one model, one call at a time, no stored user data."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..analysis.attention import QuestionAttention, model_attention
from ..analysis.features import DeltaMap, delta_maps
from ..analysis.loading import short_name
from ..analysis.reading import read_features
from ..grids import resize_tokens
from ..image_loading import load_rgb
from ..modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaImageEncodings
from ..names import check_question
from ..processors import SDLlavaProcessor
from ..serving.limits import PAGE_LIMITS, Limits

KEPT_SIDE = 1024
"""Longer side, in pixels, of the image in a session."""


VISION_ENCODERS = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP", "dinov2": "DINOv2"}
"""Names on the page, by `model_type`."""


@dataclass
class EncodedImages:
    """The images of a session with the encodings of one model.

    Args:
        images (`list[PIL.Image.Image]`): Upright RGB of limited size.
        encodings ([`SDLlavaImageEncodings`]): The features that do not depend on the question, one row per image.
    """

    images: list[Image.Image]
    encodings: SDLlavaImageEncodings


def open_uploads(files: Sequence[bytes], limits: Limits = PAGE_LIMITS) -> list[Image.Image]:
    """Decode uploaded images. The size in a header is checked before the pixels are decoded.

    Args:
        files: The contents of each file.
        limits: What the page accepts.

    Returns:
        `list[PIL.Image.Image]`: Upright RGB, with longer sides of at most `KEPT_SIDE` pixels.

    Raises:
        ValueError: There are too many files, or one is too large or unreadable.
    """
    if len(files) > limits.max_images:
        raise ValueError(f"{len(files)} images were uploaded. Upload at most {limits.max_images} at a time.")
    return [_open_upload(data, limits) for data in files]


def _open_upload(data: bytes, limits: Limits) -> Image.Image:
    if len(data) > limits.max_image_bytes:
        largest = limits.max_image_bytes / 2**20
        raise ValueError(f"The file has {len(data) / 2**20:.1f} MiB. Upload an image of at most {largest:g} MiB.")
    image = load_rgb(data, max_pixels=limits.max_image_pixels)
    image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    return image


def check_length(question: str, limits: Limits = PAGE_LIMITS) -> str:
    """A question without surrounding spaces.

    Raises:
        ValueError: It is empty or has too many characters.
    """
    question = check_question(question).strip()
    if len(question) > limits.max_question_chars:
        raise ValueError(f"The question has {len(question)} characters. Use at most {limits.max_question_chars}.")
    return question


class Engine:
    """A loaded model with a lock, so that one call runs at a time.

    Args:
        model: A model, with or without a diffusion tower.
        processor: Its processor.
        name: The model's name on the page.
        limits: What the page accepts.
        scenes_only: Whether the model only supports rendered scenes.
    """

    def __init__(
        self,
        model: SDLlavaForConditionalGeneration,
        processor: SDLlavaProcessor,
        name: str,
        limits: Limits = PAGE_LIMITS,
        scenes_only: bool = False,
    ):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.limits, self.scenes_only = limits, scenes_only
        self.lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits = PAGE_LIMITS,
        scenes_only: bool = False,
    ) -> "Engine":
        """Load a model.

        Args:
            model: Folder or repository id.
            device: Default: CUDA where available, else the CPU.
            dtype: Default: bfloat16 on CUDA, else float32.
            limits: What the page accepts.
            scenes_only: Whether the model only supports rendered scenes.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        loaded = SDLlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device)
        return cls(loaded, SDLlavaProcessor.from_pretrained(model), short_name(model), limits, scenes_only)

    @property
    def has_maps(self) -> bool:
        """Whether a diffusion tower reads the question."""
        tower = self.model.model.diffusion_tower
        return tower is not None and tower.config.conditioning != "none"

    @property
    def guidance_scale(self) -> float | None:
        """The configured guidance scale. None if there is none, or several, which one slider cannot set."""
        scales = self.model.model.diffusion_tower.config.guidance_scales if self.has_maps else []
        return scales[0] if len(scales) == 1 else None

    @property
    def vision_encoder(self) -> str | None:
        """The name of the vision encoder, which can answer without the diffusion tower."""
        config = self.model.config.vision_config
        return None if config is None else VISION_ENCODERS.get(config.model_type, config.model_type)

    @property
    def encoders(self) -> str:
        """The encoders that the model reads images with."""
        names = ["diffusion model"] if self.model.model.diffusion_tower is not None else []
        return " + ".join(names + ([self.vision_encoder] if self.vision_encoder else []))

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """Encode images once, for all questions about them."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        names = ("pixel_values", "diffusion_pixel_values")
        pixels = {name: inputs[name] for name in names if name in inputs}
        with self.lock:
            return EncodedImages(list(images), self.model.encode_images(**pixels))

    def attention(self, encoded: EncodedImages, question: str) -> list[QuestionAttention]:
        """The attention maps of the question's words, for each image."""
        rows = zip(encoded.images, encoded.encodings.rows(), strict=True)
        with self.lock:
            return [model_attention(self.model, self.processor, image, question, row) for image, row in rows]

    def delta(self, encoded: EncodedImages, question: str) -> DeltaMap:
        """The effect of the question on the features of the model's first tap and timestep, for each image."""
        tower = self.model.model.diffusion_tower
        ids = self.processor.tokenize_questions([question] * len(encoded.images), "pt").values()
        with self.lock, torch.no_grad():
            prompts = tower.encode_prompts(*(x.to(self.model.device) for x in ids))
            maps = read_features(
                tower,
                _existing(encoded.encodings.latents, "latents"),
                prompts,
                taps=[tower.taps[0].name],
                timesteps=tower.config.timesteps[:1],
                guidance_scales=[0.0, 1.0],
            )
            return delta_maps(list(maps))[0]

    def answer(self, encoded: EncodedImages, question: str, guidance_scale: float | None = None) -> Iterator[str]:
        """Generate the model's answer.

        Args:
            encoded: The images.
            question: The question.
            guidance_scale: Default: the configured scales.

        Yields:
            `str`: The answer so far.
        """
        inputs = self._inputs(encoded, question)
        ids = {name: x for name, x in inputs.items() if name.startswith("diffusion_input_ids")}
        scales = None if guidance_scale is None else [guidance_scale]

        def features() -> BaseModelOutputWithPooling:
            return self.model.get_image_features(
                image_encodings=encoded.encodings, diffusion_guidance_scales=scales, **ids
            )

        return self._stream(inputs, features)

    def answer_without_diffusion(self, encoded: EncodedImages, question: str) -> Iterator[str]:
        """Generate an answer from the vision encoder only, with the diffusion features set to zero.

        Args:
            encoded: The images.
            question: The question.

        Yields:
            `str`: The answer so far.
        """
        features = _existing(encoded.encodings.vision_features, "vision features")
        return self._stream(self._inputs(encoded, question), lambda: self._features_without_diffusion(features))

    def _features_without_diffusion(self, vision: torch.Tensor) -> BaseModelOutputWithPooling:
        config, body = self.model.config, self.model.model
        if config.fusion not in ("concat", "concat_tokens"):  # the diffusion features are added to the vision features
            fused = resize_tokens(vision, config.token_grid_size)
        else:
            diffusion = config.diffusion_config
            fused = body.fusion(vision, vision.new_zeros(len(vision), diffusion.grid_size**2, diffusion.hidden_size))
        return BaseModelOutputWithPooling(pooler_output=list(body.multi_modal_projector(fused)))

    def _inputs(self, encoded: EncodedImages, question: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in encoded.images]
        content.append({"type": "text", "text": check_length(question, self.limits)})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        return {name: x for name, x in inputs.items() if not name.endswith("pixel_values")}

    def _stream(self, inputs: dict[str, Any], features: Callable[[], BaseModelOutputWithPooling]) -> Iterator[str]:
        """Generate in a thread, which holds the lock, so that a client that disconnects does not block others."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options |= {"max_new_tokens": self.limits.max_new_tokens, "max_time": self.limits.request_seconds}
        options |= {"do_sample": False, "streamer": streamer}
        failure: list[Exception] = []

        def generate() -> None:
            try:
                with self.lock, torch.no_grad():
                    self.model.generate(mm_encoder_outputs={"image": features()}, **options)
            except Exception as error:  # raised again in the thread that reads
                failure.append(error)
                streamer.end()

        threading.Thread(target=generate, daemon=True).start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield answer.strip()
        if failure:
            raise failure[0]


def _existing(tensor: torch.Tensor | None, name: str) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"The image's encodings have no {name}. Encode it with this model.")
    return tensor
