"""Requests as the model's inputs: one item per image, whose identity is the image and the question about it.

With `fusion="concat_tokens"` an image is two items. The first holds the tokens that do not depend on the question, and
has the hash of the image only, so that vLLM's prefix caching reuses their keys and values for another question.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalIsCached

from ..chat_templates import user_turn_markers
from ..configuration import SDLlavaConfig
from ..processors import SDLlavaProcessor
from ..questions import questions_in_text

WHOLE, VISION, DIFFUSION = range(3)
"""Which of an image's tokens an item holds."""
NO_KEY = bytes(32)
"""The image key of the dummy images with which vLLM measures memory; their encodings are not cached."""
NUM_KEPT_PIXELS = 16
"""Images whose pixels are cached; 4 MB each at the papers' size."""
_ITEMS = "sdllava_items"


@dataclass(frozen=True)
class ImageItem:
    """A part of an image's tokens.

    Args:
        image_hash: Of the image.
        question: About it; empty for the tokens that do not depend on it.
        part: `WHOLE`, `VISION` or `DIFFUSION`.
    """

    image_hash: str
    question: str
    part: int = WHOLE


class SDLlavaProcessingInfo(BaseProcessingInfo):
    """The model's configuration and processor."""

    def get_hf_config(self) -> SDLlavaConfig:
        """The model's configuration."""
        return self.ctx.get_hf_config(SDLlavaConfig)

    def get_hf_processor(self, **kwargs: object) -> SDLlavaProcessor:
        """The model's processor; a request's question is not an argument of its construction."""
        return self.ctx.get_hf_processor(SDLlavaProcessor)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of an image, which all have the same number."""
        return {"image": self.get_hf_config().num_image_tokens}

    def questions(self, text: str) -> list[str]:
        """One question per image of a prompt, by the rule of `SDLlavaProcessor.apply_chat_template`."""
        processor = self.get_hf_processor()
        return questions_in_text(text, processor.image_token, user_turn_markers(processor))


class SDLlavaDummyInputs(BaseDummyInputsBuilder[SDLlavaProcessingInfo]):
    """Grey images, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Only image tokens."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        """Images of any size, which the processor resizes."""
        return {"image": [Image.new("RGB", (64, 64), "grey")] * mm_counts.get("image", 0)}


class SDLlavaMultiModalProcessor(BaseMultiModalProcessor[SDLlavaProcessingInfo]):
    """Makes the inputs of images and questions. An image is resized once for all questions about it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pixels: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        """As the base class; the model does not cache the encodings of these images."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        dummy = ImageItem("", "dummy")
        return replace(inputs, hf_processor_mm_kwargs={_ITEMS: [dummy] * mm_counts.get("image", 0)})

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """As the base class, with the question of each image.

        Raises:
            ValueError: Questions and images differ in number.
        """
        images = inputs.mm_data_items.get("image")
        if images and _ITEMS not in inputs.hf_processor_mm_kwargs:
            inputs = self._with_items(inputs, images)
        return super().apply(inputs, timing_ctx)

    def _with_items(self, inputs: ProcessorInputs, images: ImageProcessorItems) -> ProcessorInputs:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        given = kwargs.pop("question", None)
        if given is None:
            given = self.info.questions(self.info.get_tokenizer().decode(inputs.prompt))
        questions = [given] * len(images) if isinstance(given, str) else list(given)
        if len(questions) != len(images):
            raise ValueError(f"There are {len(questions)} question(s) for {len(images)} image(s). Give one per image.")
        plain = replace(inputs, hf_processor_mm_kwargs=kwargs)
        hashes = super()._get_mm_hashes(plain)["image"]
        config = self.info.get_hf_config()
        pairs = zip(hashes, questions, strict=True)
        if not config.depends_on_question:
            items = [ImageItem(image_hash, "") for image_hash, _ in pairs]
        elif not config.question_independent_tokens:
            items = [ImageItem(*pair) for pair in pairs]
        else:
            items = [
                item
                for image_hash, question in pairs
                for item in (ImageItem(image_hash, "", VISION), ImageItem(image_hash, question, DIFFUSION))
            ]
            token = config.image_token_id
            plain.prompt = [t for x in inputs.prompt for t in ([x, x] if x == token else [x])]
            twice = ImageProcessorItems([image for image in images.get_all() for _ in range(2)])
            plain.mm_data_items = MultiModalDataItems({**inputs.mm_data_items, "image": twice})
        return replace(plain, hf_processor_mm_kwargs={**kwargs, _ITEMS: items})

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        items: list[ImageItem] = inputs.hf_processor_mm_kwargs[_ITEMS]
        return {
            "image": [
                MultiModalHasher.hash_kwargs(
                    algorithm, sdllava_image=item.image_hash, question=item.question, part=str(item.part)
                )
                for item in items
            ]
        }

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: MultiModalIsCached
    ) -> Mapping[str, object]:
        kwargs = inputs.hf_processor_mm_kwargs
        pairs = zip(kwargs[_ITEMS], mm_is_cached["image"], strict=True)
        return {**kwargs, _ITEMS: [item for item, is_cached in pairs if not is_cached]}

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        options: dict[str, Any] = dict(hf_kwargs)
        items: list[ImageItem] = options.pop(_ITEMS)
        processor = self.info.get_hf_processor()
        images: Any = hf_data["images"]
        rows = [self._image_inputs(*pair, options) for pair in zip(items, images, strict=True)]
        inputs = BatchFeature({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
        if hasattr(processor, "diffusion_tokenizer"):
            inputs.update(processor.tokenize_questions([item.question for item in items], "pt"))
        keys = [hashlib.sha256(item.image_hash.encode()).digest() if item.image_hash else NO_KEY for item in items]
        inputs["image_key"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
        inputs["part"] = torch.tensor([item.part for item in items])
        return inputs

    def _image_inputs(self, item: ImageItem, image: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The pixels of an image, one row each. The image's hash includes the options of its processing."""
        pixels = self._pixels.pop(item.image_hash, None)
        if pixels is None:
            pixels = dict(self.info.get_hf_processor()(images=image, **options, return_tensors="pt"))
        self._pixels[item.image_hash] = pixels
        if len(self._pixels) > NUM_KEPT_PIXELS:
            self._pixels.popitem(last=False)
        return pixels

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_cpu = ("image_key", "part")
        return {name: MultiModalFieldConfig.batched("image", keep_on_cpu=name in on_cpu) for name in hf_inputs}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        independent = config.question_independent_tokens
        lengths = {
            WHOLE: config.num_image_tokens,
            VISION: independent,
            DIFFUSION: config.num_image_tokens - independent,
        }
        items = hf_processor_mm_kwargs.get(_ITEMS, [])

        def tokens(index: int) -> list[int]:
            return [config.image_token_id] * lengths[items[index].part]

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=tokens)]
