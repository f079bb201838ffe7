"""The processor: images for both encoders, text with placeholders, and the question for the diffusion model."""

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Concatenate

from jinja2 import TemplateError
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils import logging

from .chat_templates import user_turn_markers
from .checkpoint_files import damage_reported
from .configuration import AUTO_MAP
from .image_loading import ImageLike, load_rgb, pad_to_square
from .names import check_conversation, check_encodable
from .parts import Parts, diffusion_image_processor, read_llava_parts, read_parts
from .prompts import clean_prompts, prompt_length
from .questions import clean_question, questions_in_messages, questions_in_text
from .remote_code import save_code
from .repositories import find_file

logger = logging.get_logger(__name__)

TOKENIZERS = ("diffusion_tokenizer", "diffusion_tokenizer_2", "diffusion_tokenizer_3")
INPUT_IDS = tuple(name.replace("tokenizer", "input_ids") for name in TOKENIZERS)
"""Tokenizers that a processor can have for the diffusion model's prompt, and the inputs that they make."""
_PARTS = ("image_processor", "tokenizer", "diffusion_image_processor", *TOKENIZERS)
_TOKENIZING = threading.Lock()
"""Held while a tokenizer is called: a call changes its padding and truncation, which all threads share."""


class _PartNames:
    """As a class method, all parts a processor can have; on an instance, those it has."""

    def __get__(self, instance: Any, owner: type) -> Callable[[], list[str]]:
        return lambda: [name for name in _PARTS if instance is None or getattr(instance, name, None) is not None]


class SDLlavaProcessor(ProcessorMixin):
    """Makes the inputs of `SDLlavaForConditionalGeneration`. Several threads can use one processor.

    One row per image: `pixel_values` for the vision encoder, `diffusion_pixel_values` in [-1, 1] and
    `diffusion_input_ids` (and `_2` for SDXL and FLUX, also `_3` for Stable Diffusion 3) for the diffusion tower.

    Args:
        image_processor: The vision encoder's; None for a model with only a diffusion tower.
        tokenizer: The language model's.
        diffusion_image_processor: Resizes to the VAE's size and scales to [-1, 1]; None for plain LLaVA.
        diffusion_tokenizer, diffusion_tokenizer_2, diffusion_tokenizer_3: The diffusion model's, as many as it has.
        num_image_tokens (`int`): Placeholders per image, `SDLlavaConfig.num_image_tokens`.
        pad_to_square (`bool`): Centre the vision encoder's images on a square of its mean colour before its own
            processor, so that both encoders' grids align. An upgraded LLaVA keeps its own setting. The diffusion
            model's images are always padded.
        image_token (`str`): The placeholder in text.
        chat_template (`str`, *optional*): Default: the tokenizer's.
        kwargs: Ignored; saved fields of other versions.
    """

    get_attributes = _PartNames()
    push_files: ClassVar[Callable[Concatenate[str, str, ...], Any] | None] = None
    """Pushes the files of a saved processor to the Hub: (folder, repository id, options). Set by
    `registration.register`."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        diffusion_image_processor: Any = None,
        diffusion_tokenizer: Any = None,
        diffusion_tokenizer_2: Any = None,
        diffusion_tokenizer_3: Any = None,
        num_image_tokens: int = 576,
        pad_to_square: bool = True,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        tokenizers = (diffusion_tokenizer, diffusion_tokenizer_2, diffusion_tokenizer_3)
        given = (image_processor, tokenizer, diffusion_image_processor, *tokenizers)
        parts = {name: part for name, part in zip(_PARTS, given, strict=True) if part is not None}
        for name, part in parts.items():
            setattr(self, name, part)
        self.num_image_tokens = num_image_tokens
        self.pad_to_square = pad_to_square
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"
        super().__init__(**parts, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_parts(cls, parts: Parts) -> "SDLlavaProcessor":
        """The processor of parts whose configurations have been read.

        Args:
            parts: From [`~sdllava.parts.read_parts`] or [`~sdllava.parts.read_llava_parts`].
        """
        tower = parts.config.diffusion_config
        return cls(
            parts.image_processor,
            parts.tokenizer,
            None if tower is None else diffusion_image_processor(tower),
            **dict(zip(TOKENIZERS, parts.diffusion_tokenizers, strict=False)),
            num_image_tokens=parts.config.num_image_tokens,
            pad_to_square=parts.pad_to_square,
            chat_template=parts.chat_template,
        )

    @classmethod
    def from_component_pretrained(
        cls,
        diffusion: str | None = None,
        vision: str | None = None,
        language_model: str | None = None,
        **config: Any,
    ) -> "SDLlavaProcessor":
        """The processor of published parts; see [`~sdllava.parts.read_parts`]."""
        return cls.from_parts(read_parts(diffusion, vision, language_model, **config))

    @classmethod
    def from_llava_pretrained(cls, llava: str, diffusion: str | None = None, **config: Any) -> "SDLlavaProcessor":
        """The processor of an upgraded LLaVA; see [`~sdllava.parts.read_llava_parts`]."""
        return cls.from_parts(read_llava_parts(llava, diffusion, **config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.from_pretrained`.

        Raises:
            CheckpointError: A file of the folder is damaged.
            OSError: The folder or repository does not hold a processor.
        """
        with damage_reported(pretrained_model_name_or_path, "the processor"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        config = processor_dict or {}
        path, subfolder = pretrained_model_name_or_path, kwargs.pop("subfolder", "")
        kwargs.setdefault("trust_remote_code", False)  # instead of a question on the terminal

        def tokenizer(name: str) -> Any:
            folder = os.path.join(subfolder, name)
            if find_file(path, os.path.join(folder, "tokenizer_config.json"), kwargs) is None:
                return None
            return AutoTokenizer.from_pretrained(path, subfolder=folder, **kwargs)

        image_processor = diffusion_image_processor = None
        if config.get("image_processor"):
            image_processor = AutoImageProcessor.from_pretrained(path, subfolder=subfolder, **kwargs)
        if config.get("diffusion_image_processor"):
            diffusion_image_processor = CLIPImageProcessorPil(**config["diffusion_image_processor"])
        language_tokenizer = AutoTokenizer.from_pretrained(path, subfolder=subfolder, **kwargs)
        return [image_processor, language_tokenizer, diffusion_image_processor, *map(tokenizer, TOKENIZERS)]

    def to_dict(self) -> dict[str, Any]:
        """As `ProcessorMixin.to_dict`, with the code that loads it."""
        return {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As `ProcessorMixin.save_pretrained`, with the code next to it for processes without this package."""
        save_code(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Push the processor. Where `sdllava` is installed, it is one commit, with the code and without a model card.

        Args:
            repo_id: The repository, `owner/name`.
            tags: Raises where `sdllava` is installed: tags are part of the card, which the model's `push_to_hub` makes.
            kwargs: As for `ProcessorMixin.push_to_hub`; `max_shard_size` has no effect.

        Raises:
            ValueError: `tags` are given.
            PermissionError: The Hub does not accept the token.
        """
        push = type(self).push_files
        if push is None:
            return super().push_to_hub(repo_id, tags=tags, **kwargs)
        if tags:
            raise ValueError(
                f"The push of a processor makes no model card for the tags {tags!r}. Give them to the model's "
                "`push_to_hub`."
            )
        kwargs.pop("max_shard_size", None)
        kwargs["commit_message"] = kwargs.get("commit_message") or "Upload processor"
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        names = ["input_ids", "attention_mask"]
        if hasattr(self, "image_processor"):
            names.append("pixel_values")
        if hasattr(self, "diffusion_image_processor"):
            names.append("diffusion_pixel_values")
        return names + [ids for name, ids in zip(TOKENIZERS, INPUT_IDS, strict=True) if hasattr(self, name)]

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | list[str] | None = None,
        question: str | Sequence[str] | None = None,
        conversation_questions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images and text.

        Args:
            images: One image, a list, or a list of lists (one for each text), in the order of the placeholders.
            text (`str` or `list[str]`): With one image token per image.
            question (`str` or `list[str]`): The diffusion model's prompt, one for all images or one per image; the
                empty string is the empty prompt. Default: the question found in the conversation, else in the text
                around each image token.
            conversation_questions (`list[str]`): The conversation's, one per image, from `apply_chat_template`.
            kwargs: For the tokenizer and the vision encoder's image processor.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` `(batch, sequence)`; for n images `pixel_values`
            `(n, 3, h, w)`, `diffusion_pixel_values` `(n, 3, image_size, image_size)`, `diffusion_input_ids`
            `(n, tokens)`.

        Raises:
            TypeError: Text or a question is not a string.
            ValueError: Image tokens, images and questions differ in number, or an image cannot be read.
        """
        if images is None and text is None:
            raise ValueError("Both images and text are None. Give images, text, or both.")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        if texts == []:
            raise ValueError("text is an empty list. Give at least one text.")
        self._check_counts(images, texts)
        loaded = self._load_images(images)
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        merged["images_kwargs"].pop("return_tensors", None)

        data: dict[str, Any] = {}
        if texts is not None:
            questions = self._questions(loaded, texts, question, conversation_questions)
            data.update(self._text_inputs(texts, len(loaded), merged))
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
                raise TypeError(f"Text {sample!r} is not a string. Give a string or a list of strings.")
            check_encodable(sample, "Text")
        placeholders = [sample.count(self.image_token) for sample in texts]
        nested = isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images)
        if nested and len(images) == len(texts):
            given = [sum(x is not None for x in (row if isinstance(row, list | tuple) else [row])) for row in images]
        else:
            placeholders, given = [sum(placeholders)], [len(_flat(images))]
        for row, (tokens, count) in enumerate(zip(placeholders, given, strict=True)):
            if tokens != count:
                where = f"Text {row}" if nested else "The text"
                raise ValueError(
                    f"{where} has {tokens} {self.image_token} token(s) but {count} image(s) were given. Write one "
                    "token per image."
                )

    def _text_inputs(self, texts: list[str], num_images: int, merged: dict[str, Any]) -> dict[str, Any]:
        options = merged["text_kwargs"]
        type_ids = options.pop("return_mm_token_type_ids", merged.get("return_mm_token_type_ids", False))
        offsets = options.pop("return_text_replacement_offsets", merged.get("return_text_replacement_offsets", False))
        replacements = [self.image_token * self.num_image_tokens] * num_images
        expanded, replacement_offsets = self.get_text_with_replacements(list(texts), replacements)
        with _TOKENIZING:
            inputs = dict(self.tokenizer(expanded, **options))
        self._check_special_mm_tokens(expanded, inputs, modalities=["image"])
        if offsets:
            inputs["text_replacement_offsets"] = replacement_offsets
        if type_ids:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(inputs["input_ids"])
        return inputs

    def _image_inputs(self, images: list, images_kwargs: dict[str, Any], return_tensors: str | None) -> dict[str, Any]:
        inputs = {}
        colour = self._mean_colour()
        padded = [pad_to_square(image, colour) for image in images]
        if hasattr(self, "image_processor"):
            squared = padded if self.pad_to_square else images
            inputs.update(self.image_processor(squared, return_tensors=return_tensors, **images_kwargs))
        if hasattr(self, "diffusion_image_processor"):
            diffusion = self.diffusion_image_processor(padded, return_tensors=return_tensors)
            inputs["diffusion_pixel_values"] = diffusion["pixel_values"]
        return inputs

    def _mean_colour(self) -> list[int]:
        mean = self.image_processor.image_mean if hasattr(self, "image_processor") else OPENAI_CLIP_MEAN
        return [int(255 * channel) for channel in mean]

    def tokenize_questions(self, questions: Sequence[str], return_tensors: str | None = None) -> dict[str, Any]:
        """The diffusion model's prompts, as token ids of shape `(n, tokens)` for each of its tokenizers.

        Image tokens and LLaVA's two format instructions are left out. Longer questions are truncated, with one warning.

        Args:
            questions: One per image.
            return_tensors: As for tokenizers, for example "pt".
        """
        cleaned = [clean_question(question, self.image_token) for question in questions]
        inputs = {}
        for name, key in zip(TOKENIZERS, INPUT_IDS, strict=True):
            if (tokenizer := getattr(self, name, None)) is None:
                continue
            prompts, length = clean_prompts(tokenizer, cleaned), prompt_length(tokenizer)
            options = {"padding": "max_length", "truncation": True, "max_length": length}
            with _TOKENIZING:
                whole = tokenizer(prompts, verbose=False)["input_ids"]
                inputs[key] = tokenizer(prompts, return_tensors=return_tensors, **options)["input_ids"]
            if any(len(ids) > length for ids in whole):
                logger.warning_once(f"A question has more than the diffusion model's {length} tokens and is truncated.")
        return inputs

    def _questions(
        self,
        images: list,
        texts: list[str],
        question: str | Sequence[str] | None,
        conversation_questions: Sequence[str] | None,
    ) -> list[str]:
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
                raise TypeError(f"Question {entry!r} is not a string. Give a string per image.")
            check_encodable(entry, "Question")
        if len(questions) != num_images:
            raise ValueError(
                f"There are {len(questions)} question(s) for {num_images} image(s). Give one for all, or one per image."
            )
        return questions

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        question: str | Sequence[str] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `ProcessorMixin.apply_chat_template`; each image's question conditions the diffusion model.

        An image's question is the last user turn after it and before the next turn with an image.

        Args:
            conversation: One conversation or a list of them.
            chat_template (`str`, *optional*): Instead of the processor's.
            question (`str` or `list[str]`): Instead of the conversation's; one for all images or one per image.
            processor_kwargs: For `__call__`.
            kwargs: As for `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: The conversation is not a list of messages with roles, a content block lacks its type or its
                text, or the template is not valid, does what the sandbox forbids, or rejects the conversation.
        """
        check_conversation(conversation)
        if question is not None:
            processor_kwargs = {**(processor_kwargs or {}), "question": question}
        try:
            return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)
        except (TemplateError, OverflowError) as error:
            raise ValueError(
                f"The chat template failed: {error} ({type(error).__name__}). Correct the conversation, or "
                "chat_template.jinja of the model's folder."
            ) from error

    def _multimodal_inputs_from_conversations(self, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        images, videos, audios, extra = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        questions = [question for conversation in conversations for question in questions_in_messages(conversation)]
        return images, videos, audios, {**extra, "conversation_questions": questions}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholders that replace one image token."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Placeholders and rows of each image, for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)


def _flat(images: Any) -> list:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        images = list(images) if getattr(images, "ndim", 0) == 4 else [images]
    return [x for item in images for x in (item if isinstance(item, list | tuple) else [item]) if x is not None]
