"""The processor: images for both encoders, text with placeholders, and the question for the diffusion model."""

import os
import re
from collections.abc import Sequence
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import cached_file, logging

from .chat_templates import UserTurnMarkers, user_turn_markers
from .configuration import AUTO_MAP, SDLlavaDiffusionConfig
from .image_loading import ImageLike, load_rgb, pad_to_square
from .remote_code import save_code

logger = logging.get_logger(__name__)

FORMAT_SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""LLaVA's two instructions about the form of the answer, which the diffusion model is not asked."""

_PARTS = ("image_processor", "tokenizer", "diffusion_image_processor", "diffusion_tokenizer", "diffusion_tokenizer_2")


class _PartNames:
    """As a class method, all parts a processor can have; on an instance, those it has."""

    def __get__(self, instance, owner):
        return lambda: [name for name in _PARTS if instance is None or getattr(instance, name, None) is not None]


class SDLlavaProcessor(ProcessorMixin):
    """Makes the inputs of `SDLlavaForConditionalGeneration`.

    One row an image: `pixel_values` for the static encoder, `diffusion_pixel_values` in [-1, 1] and
    `diffusion_input_ids` (and `_2` for SDXL) for the diffusion tower.

    Args:
        image_processor: the static encoder's; None for diffusion alone.
        tokenizer: the language model's.
        diffusion_image_processor: resizes to the VAE's size and scales to [-1, 1]; None for plain LLaVA.
        diffusion_tokenizer, diffusion_tokenizer_2: the diffusion model's, SDXL has two.
        num_image_tokens (`int`): placeholders an image, `SDLlavaConfig.num_image_tokens`.
        pad_to_square (`bool`): centre the static encoder's images on a square of its mean colour before its own
            processor sees them, so that both encoders' grids align. An upgraded LLaVA keeps its own setting. The
            diffusion model's images are always padded.
        image_token (`str`): the placeholder in text.
    """

    get_attributes = _PartNames()

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        diffusion_image_processor=None,
        diffusion_tokenizer=None,
        diffusion_tokenizer_2=None,
        num_image_tokens: int = 576,
        pad_to_square: bool = True,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs,
    ):
        given = (image_processor, tokenizer, diffusion_image_processor, diffusion_tokenizer, diffusion_tokenizer_2)
        parts = {name: part for name, part in zip(_PARTS, given) if part is not None}
        for name, part in parts.items():
            setattr(self, name, part)
        self.num_image_tokens = num_image_tokens
        self.pad_to_square = pad_to_square
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"
        super().__init__(**parts, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_component_pretrained(
        cls,
        diffusion: str | None = None,
        vision: str | None = None,
        language_model: str | None = None,
        **config,
    ) -> "SDLlavaProcessor":
        """The processor of published parts; see [`~sdllava.components.compose_processor`]."""
        from .components import compose_processor

        return compose_processor(diffusion=diffusion, vision=vision, language_model=language_model, **config)

    @classmethod
    def from_llava_pretrained(cls, llava: str, diffusion: str | None = None, **config) -> "SDLlavaProcessor":
        """The processor of an upgraded LLaVA; see [`~sdllava.components.compose_processor_from_llava`]."""
        from .components import compose_processor_from_llava

        return compose_processor_from_llava(llava, diffusion=diffusion, **config)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        config = processor_dict or {}
        path, subfolder = pretrained_model_name_or_path, kwargs.pop("subfolder", "")

        def tokenizer(name: str):
            folder = os.path.join(subfolder, name)
            file = os.path.join(folder, "tokenizer_config.json")
            found = cached_file(path, file, _raise_exceptions_for_missing_entries=False, **_hub_options(kwargs))
            return None if found is None else AutoTokenizer.from_pretrained(path, subfolder=folder, **kwargs)

        image_processor = diffusion_image_processor = None
        if config.get("image_processor"):
            image_processor = AutoImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs)
        if config.get("diffusion_image_processor"):
            diffusion_image_processor = CLIPImageProcessorPil(**config["diffusion_image_processor"])
        language_tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, **kwargs)
        diffusion_tokenizers = [tokenizer("diffusion_tokenizer"), tokenizer("diffusion_tokenizer_2")]
        return [image_processor, language_tokenizer, diffusion_image_processor, *diffusion_tokenizers]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As `ProcessorMixin.save_pretrained`, with the code beside it for processes without this package."""
        save_code(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask"]
        if hasattr(self, "image_processor"):
            names.append("pixel_values")
        if hasattr(self, "diffusion_image_processor"):
            names += ["diffusion_pixel_values", "diffusion_input_ids"]
        return [*names, "diffusion_input_ids_2"] if hasattr(self, "diffusion_tokenizer_2") else names

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | list[str] | None = None,
        question: str | Sequence[str] | None = None,
        conversation_questions: Sequence[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare images and text.

        Args:
            images: one image, a list, or a list of lists (one for each text), in the order of the placeholders.
            text (`str` or `list[str]`): with one image token for each image.
            question (`str` or `list[str]`): what the diffusion model is asked, one for all images or one for each;
                the empty string is the empty prompt. Default: the question found in the conversation, else in the
                text around each image token.
            conversation_questions (`list[str]`): the conversation's, one an image, from `apply_chat_template`.
            kwargs: for the tokenizer and the static encoder's image processor.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` `(batch, sequence)`; for n images `pixel_values`
            `(n, 3, h, w)`, `diffusion_pixel_values` `(n, 3, image_size, image_size)`, `diffusion_input_ids` `(n, 77)`.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        self._check_counts(images, texts)
        loaded = self._load_images(images)
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        merged["images_kwargs"].pop("return_tensors", None)

        data: dict[str, Any] = {}
        if texts is not None:
            questions = self._questions(loaded, texts, question, conversation_questions)
            data.update(self._text_inputs(texts, len(loaded), merged, return_tensors))
        elif question is not None:
            questions = self._given_questions(question, len(loaded))
        else:
            questions = None
        if loaded:
            data.update(self._image_inputs(loaded, merged["images_kwargs"], return_tensors))
            if questions is not None and hasattr(self, "diffusion_tokenizer"):
                data.update(self.tokenize_questions(questions, return_tensors))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _load_images(self, images: Any) -> list:
        return [load_rgb(image) for image in _flat(images)]

    def _check_counts(self, images: Any, texts: list[str] | None) -> None:
        if texts is None:
            return
        for sample in texts:
            if not isinstance(sample, str):
                raise TypeError(f"text must be a string or a list of strings, not {sample!r}")
        placeholders = [sample.count(self.image_token) for sample in texts]
        nested = isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images)
        if nested and len(images) == len(texts):
            given = [sum(x is not None for x in (row if isinstance(row, list | tuple) else [row])) for row in images]
        else:
            placeholders, given = [sum(placeholders)], [len(_flat(images))]
        for row, (tokens, count) in enumerate(zip(placeholders, given)):
            if tokens != count:
                where = f"text {row}" if nested else "the text"
                raise ValueError(
                    f"{where} has {tokens} {self.image_token} token(s) but {count} image(s) were given: "
                    "write one token for each image"
                )

    def _text_inputs(self, texts: list[str], num_images: int, merged: dict, return_tensors) -> dict[str, Any]:
        options = merged["text_kwargs"]
        type_ids = options.pop("return_mm_token_type_ids", merged.get("return_mm_token_type_ids", False))
        offsets = options.pop("return_text_replacement_offsets", merged.get("return_text_replacement_offsets", False))
        replacements = [self.image_token * self.num_image_tokens] * num_images
        expanded, replacement_offsets = self.get_text_with_replacements(list(texts), replacements)
        inputs = dict(self.tokenizer(expanded, **options))
        self._check_special_mm_tokens(expanded, inputs, modalities=["image"])
        if offsets:
            inputs["text_replacement_offsets"] = replacement_offsets
        if type_ids:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        return inputs

    def _image_inputs(self, images: list, images_kwargs: dict, return_tensors) -> dict[str, Any]:
        inputs = {}
        colour = self._mean_colour()
        padded = [pad_to_square(image, colour) for image in images]
        if hasattr(self, "image_processor"):
            static = padded if self.pad_to_square else images
            inputs.update(self.image_processor(static, return_tensors=return_tensors, **images_kwargs))
        if hasattr(self, "diffusion_image_processor"):
            diffusion = self.diffusion_image_processor(padded, return_tensors=return_tensors)
            inputs["diffusion_pixel_values"] = diffusion["pixel_values"]
        return inputs

    def _mean_colour(self) -> list[int]:
        mean = self.image_processor.image_mean if hasattr(self, "image_processor") else OPENAI_CLIP_MEAN
        return [int(255 * channel) for channel in mean]

    def tokenize_questions(self, questions: Sequence[str], return_tensors=None) -> dict[str, Any]:
        """What the diffusion model is asked, as token ids of shape `(n, 77)` for each of its tokenizers.

        Image tokens and LLaVA's two format instructions are left out; longer questions are cut, with one warning.
        """
        cleaned = [clean_question(question, self.image_token) for question in questions]
        inputs = {}
        for name in ("diffusion_tokenizer", "diffusion_tokenizer_2"):
            if (tokenizer := getattr(self, name, None)) is None:
                continue
            length = min(tokenizer.model_max_length, 77)
            if any(len(ids) > length for ids in tokenizer(cleaned, verbose=False)["input_ids"]):
                logger.warning_once(f"a question is longer than the diffusion model's {length} tokens and is cut")
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            key = name.replace("tokenizer", "input_ids")
            inputs[key] = tokenizer(cleaned, return_tensors=return_tensors, **options)["input_ids"]
        return inputs

    def _questions(self, images, texts, question, conversation_questions) -> list[str]:
        if question is not None:
            return self._given_questions(question, len(images))
        if conversation_questions is not None:
            return list(conversation_questions)
        markers = user_turn_markers(self)
        return [found for text in texts for found in questions_in_text(text, self.image_token, markers)]

    def _given_questions(self, question: str | Sequence[str], num_images: int) -> list[str]:
        questions: list[Any] = list(question) if isinstance(question, list | tuple) else [question] * num_images
        for entry in questions or [question]:
            if not isinstance(entry, str):
                raise TypeError(f"a question must be text, not {entry!r}")
        if len(questions) != num_images:
            raise ValueError(
                f"{len(questions)} question(s) for {num_images} image(s): give one for all or one for each"
            )
        return questions

    def apply_chat_template(self, conversation, chat_template=None, question=None, processor_kwargs=None, **kwargs):
        """As `ProcessorMixin.apply_chat_template`; the diffusion model is asked the last user turn behind each image and
        before the next turn with an image.

        Args:
            question (`str` or `list[str]`): ask the diffusion model this instead; one for all images or one for each.
        """
        if question is not None:
            processor_kwargs = {**(processor_kwargs or {}), "question": question}
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        images, videos, audios, extra = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        questions = [question for conversation in conversations for question in questions_in_messages(conversation)]
        return images, videos, audios, {**extra, "conversation_questions": questions}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders and rows of each image, for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def _hub_options(kwargs: dict) -> dict:
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    return {name: kwargs[name] for name in names if name in kwargs}


def _flat(images: Any) -> list:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
    return [x for item in images for x in (item if isinstance(item, list | tuple) else [item]) if x is not None]


def clean_question(question: str, image_token: str = "<image>") -> str:
    """A user turn as the diffusion model is asked it: without image tokens and LLaVA's format instructions."""
    for removed in (image_token, *FORMAT_SUFFIXES):
        question = question.replace(removed, "")
    return question.strip()


def questions_in_messages(messages: Sequence[dict]) -> list[str]:
    """One question an image: the last user turn from the image's own on, before the next turn with an image."""
    turns = []
    for message in messages:
        content = message.get("content") or []
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = sum(block["type"] == "image" for block in content)
        text = " ".join(block["text"] for block in content if block["type"] == "text").strip()
        if images or message["role"] == "user":
            turns.append((images, text))
    return _last_turn_behind_each_image(turns)


def questions_in_text(text: str, image_token: str, markers: UserTurnMarkers | None) -> list[str]:
    """One question an image token of a rendered prompt, by its template's user turns; else the text around them."""
    if markers is not None and markers.start in text:
        parts = [part.split(markers.end, 1)[0] for part in text.split(markers.start)[1:]]
        if sum(part.count(image_token) for part in parts) == text.count(image_token):
            turns = [(part.count(image_token), clean_question(part, image_token)) for part in parts]
            return _last_turn_behind_each_image(turns)
    return [re.sub(r"\s+", " ", clean_question(text, image_token))] * text.count(image_token)


def _last_turn_behind_each_image(turns: Sequence[tuple[int, str]]) -> list[str]:
    questions: list[str] = []
    waiting, last = 0, ""
    for images, text in turns:
        if images:
            questions += [last] * waiting
            waiting, last = images, ""
        last = text or last
    return questions + [last] * waiting


def diffusion_image_processor(config: SDLlavaDiffusionConfig) -> CLIPImageProcessorPil:
    """The image processor of a diffusion tower: a square image at the VAE's size, bicubic, in [-1, 1]."""
    size = {"height": config.image_size, "width": config.image_size}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
