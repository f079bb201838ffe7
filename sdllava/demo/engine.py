"""The computations of the demo page, without the page: one model, one call at a time, no stored user data."""

import threading
from collections.abc import Callable, Iterator
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


@dataclass
class EncodedImage:
    """The image of a session with its encodings.

    Args:
        image (`PIL.Image.Image`): Upright RGB of limited size.
        encodings ([`SDLlavaImageEncodings`]): The features that do not depend on the question.
    """

    image: Image.Image
    encodings: SDLlavaImageEncodings


def open_upload(data: bytes, limits: Limits = PAGE_LIMITS) -> Image.Image:
    """Decode an uploaded image. The size in its header is checked before its pixels are decoded.

    Args:
        data: The contents of the file.
        limits: What the page accepts.

    Returns:
        `PIL.Image.Image`: Upright RGB, with a longer side of at most `KEPT_SIDE` pixels.

    Raises:
        ValueError: The file is too large or unreadable.
    """
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
        model: A model with a diffusion tower.
        processor: Its processor.
        name: The model's name on the page.
        limits: What the page accepts.

    Raises:
        ValueError: The model does not have a diffusion tower.
    """

    def __init__(
        self,
        model: SDLlavaForConditionalGeneration,
        processor: SDLlavaProcessor,
        name: str,
        limits: Limits = PAGE_LIMITS,
    ):
        if model.model.diffusion_tower is None:
            raise ValueError(f"{name!r} does not have a diffusion tower. Use a model that has one.")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.limits = limits
        self.lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, model: str, device: str | None = None, dtype: str | None = None, limits: Limits = PAGE_LIMITS
    ) -> "Engine":
        """Load a model.

        Args:
            model: Folder or repository id.
            device: Default: CUDA where available, else the CPU.
            dtype: Default: bfloat16 on CUDA, else float32.
            limits: What the page accepts.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        loaded = SDLlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device)
        return cls(loaded, SDLlavaProcessor.from_pretrained(model), short_name(model), limits)

    @property
    def guidance_scale(self) -> float | None:
        """The configured guidance scale. None if there are several, which one slider cannot set."""
        scales = self.model.model.diffusion_tower.config.guidance_scales
        return scales[0] if len(scales) == 1 else None

    @property
    def has_vision_encoder(self) -> bool:
        """Whether the model has a vision encoder in addition to the diffusion tower."""
        return self.model.model.vision_tower is not None

    def encode(self, image: Image.Image) -> EncodedImage:
        """Encode an image once, for all questions about it."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        names = ("pixel_values", "diffusion_pixel_values")
        pixels = {name: inputs[name] for name in names if name in inputs}
        with self.lock:
            return EncodedImage(image, self.model.encode_images(**pixels))

    def attention(self, encoded: EncodedImage, question: str) -> QuestionAttention:
        """The attention maps of the question's words."""
        with self.lock:
            return model_attention(self.model, self.processor, encoded.image, question, encoded.encodings)

    def delta(self, encoded: EncodedImage, question: str) -> DeltaMap:
        """The effect of the question on the features of the model's first tap and timestep."""
        tower = self.model.model.diffusion_tower
        ids = self.processor.tokenize_questions([question], "pt").values()
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

    def answer(self, encoded: EncodedImage, question: str, guidance_scale: float | None = None) -> Iterator[str]:
        """Generate the answer of the fused model.

        Args:
            encoded: The image.
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

    def answer_without_diffusion(self, encoded: EncodedImage, question: str) -> Iterator[str]:
        """Generate an answer from the vision encoder only, with the diffusion features set to zero.

        Args:
            encoded: The image.
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

    def _inputs(self, encoded: EncodedImage, question: str) -> dict[str, Any]:
        content = [
            {"type": "image", "image": encoded.image},
            {"type": "text", "text": check_length(question, self.limits)},
        ]
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
