"""What the page does, without the page: one model, one caller at a time, nothing of a user's kept."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..analysis.attention import QuestionAttention, model_attention
from ..analysis.features import DeltaMap, delta_maps
from ..analysis.loading import short_name
from ..analysis.reading import read_features
from ..fusion import resize_tokens
from ..image_loading import load_rgb
from ..modeling_sdllava import SDLlavaForConditionalGeneration, SDLlavaImageEncodings
from ..pipeline import check_question
from ..processors import SDLlavaProcessor

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 50_000_000
KEPT_SIDE = 1024
"""Pixels of the longer side of what is held of an image while its user is there."""
MAX_QUESTION = 1000
"""Characters of a question."""
MAX_NEW_TOKENS = 128
"""Tokens of an answer."""


@dataclass
class Look:
    """An image that a user looks at: upright RGB of bounded size, and what does not depend on the question."""

    image: Image.Image
    encodings: SDLlavaImageEncodings


def open_upload(data: bytes) -> Image.Image:
    """Decode an uploaded image; it is refused by its header, before its pixels are decoded, where it is too large.

    Raises:
        ValueError: one sentence, for the user.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the file has {len(data) / 2**20:.1f} MB: images may have up to {MAX_BYTES / 2**20:g} MB")
    try:
        with Image.open(BytesIO(data)) as opened:
            width, height = opened.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError("the file is no image that can be read: give a JPEG, PNG or WebP") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"the image has {width} x {height} pixels: up to {MAX_PIXELS // 10**6} million are taken")
    image = load_rgb(data)
    image.thumbnail((KEPT_SIDE, KEPT_SIDE))
    return image


class Engine:
    """A loaded model behind a lock.

    Args:
        model, processor: with a diffusion tower.
        name (`str`): as the page calls it.
    """

    def __init__(self, model: SDLlavaForConditionalGeneration, processor: SDLlavaProcessor, name: str):
        if model.model.diffusion_tower is None:
            raise ValueError(f"{name!r} has no diffusion tower: there is nothing to look into")
        self.model, self.processor, self.name = model.eval(), processor, name
        self.lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, model: str, device: str | None = None, dtype: str | None = None) -> "Engine":
        """Load a folder or repository; by default on CUDA in bfloat16 where there is one, else in float32."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        loaded = SDLlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device)
        return cls(loaded, SDLlavaProcessor.from_pretrained(model), short_name(model))

    @property
    def guidance_scale(self) -> float | None:
        """The configured scale; None where the model combines several, which one slider cannot set."""
        scales = self.model.model.diffusion_tower.config.guidance_scales
        return scales[0] if len(scales) == 1 else None

    @property
    def has_static_encoder(self) -> bool:
        return self.model.model.vision_tower is not None

    def look(self, image: Image.Image) -> Look:
        """Encode an image once, for all questions about it."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        names = ("pixel_values", "diffusion_pixel_values")
        with self.lock:
            return Look(image, self.model.encode_images(**{name: inputs[name] for name in names if name in inputs}))

    def attention(self, look: Look, question: str) -> QuestionAttention:
        """Where the question's words look."""
        with self.lock:
            return model_attention(self.model, self.processor, look.image, question, look.encodings)

    def delta(self, look: Look, question: str) -> DeltaMap:
        """What the question moves at the model's first tap and timestep."""
        tower = self.model.model.diffusion_tower
        ids = self.processor.tokenize_questions([question], "pt").values()
        place = {"taps": [tower.taps[0].name], "timesteps": tower.config.timesteps[:1], "guidance_scales": [0.0, 1.0]}
        with self.lock, torch.no_grad():
            prompts = tower.encode_prompts(*(x.to(self.model.device) for x in ids))
            return delta_maps(list(read_features(tower, look.encodings.latents, prompts, **place)))[0]

    def answer(self, look: Look, question: str, guidance_scale: float | None = None) -> Iterator[str]:
        """The fused model's answer, as it grows."""
        inputs = self._inputs(look, question)
        ids = {name: x for name, x in inputs.items() if name.startswith("diffusion_input_ids")}
        scales = None if guidance_scale is None else [guidance_scale]

        def features() -> BaseModelOutputWithPooling:
            return self.model.get_image_features(
                image_encodings=look.encodings, diffusion_guidance_scales=scales, **ids
            )

        return self._stream(inputs, features)

    def answer_without_diffusion(self, look: Look, question: str) -> Iterator[str]:
        """The same model's answer from its static encoder alone, its diffusion features left out."""
        config, body = self.model.config, self.model.model
        static = look.encodings.vision_features

        def features() -> BaseModelOutputWithPooling:
            if config.fusion in ("cross_attention", "gated"):  # a residual on static features
                side = config.token_grid_size
                fused = static if static.shape[1] == side**2 else resize_tokens(static, side)
            else:
                diffusion = config.diffusion_config
                fused = body.fusion(
                    static, static.new_zeros(len(static), diffusion.grid_size**2, diffusion.hidden_size)
                )
            return BaseModelOutputWithPooling(pooler_output=list(body.multi_modal_projector(fused)))

        return self._stream(self._inputs(look, question), features)

    def _inputs(self, look: Look, question: str) -> dict[str, Any]:
        content = [{"type": "image", "image": look.image}, {"type": "text", "text": check_text(question)}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        return {name: x for name, x in inputs.items() if not name.endswith("pixel_values")}

    def _stream(self, inputs: dict[str, Any], features: Callable[[], BaseModelOutputWithPooling]) -> Iterator[str]:
        """The lock belongs to the generating thread, so a reader who leaves early keeps nobody waiting."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options |= {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "streamer": streamer}
        failure: list[Exception] = []

        def generate() -> None:
            try:
                with self.lock, torch.no_grad():
                    self.model.generate(mm_encoder_outputs={"image": features()}, **options)
            except Exception as error:  # handed over to the thread that reads
                failure.append(error)
                streamer.end()

        threading.Thread(target=generate, daemon=True).start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield answer.strip()
        if failure:
            raise failure[0]


def check_text(question: str) -> str:
    """Raises:
    ValueError: the question is empty or longer than `MAX_QUESTION`.
    """
    question = check_question(question).strip()
    if len(question) > MAX_QUESTION:
        raise ValueError(f"the question has {len(question)} characters: up to {MAX_QUESTION} are taken")
    return question
