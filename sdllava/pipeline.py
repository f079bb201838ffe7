"""`pipeline("visual-question-answering")`, as transformers 4 had it, for vision-language models."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from transformers import Pipeline
from transformers.pipelines.pt_utils import KeyDataset

from .image_loading import load_rgb
from .names import check_question
from .outputs import SDLlavaImageEncodings
from .prefix_cache import PrefixCache

NUM_KEPT_IMAGES = 8
"""Images whose features are cached, so that a follow-up question costs one conditional pass."""


def image_key(image: Image) -> str:
    """A hash of an image's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


class CachedEncodings:
    """Cached image features of a model: what does not depend on the question, for the last images.

    Args:
        model: With `encode_images`.
        size: The number of images.
    """

    def __init__(self, model: Any, size: int = NUM_KEPT_IMAGES):
        self.model, self.size = model, size
        self._kept: OrderedDict[str, SDLlavaImageEncodings] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def replace_pixels(self, images: Sequence[Image], inputs: Any) -> None:
        """As `replace`, with the images themselves."""
        self.replace([image_key(image) for image in images], inputs)

    def replace(self, keys: Sequence[str], inputs: Any) -> None:
        """Replace the pixels in a processor's output by `image_encodings`; each new image is encoded once.

        Args:
            keys: From [`image_key`], of the processor's images, in order.
            inputs: With `pixel_values`, `diffusion_pixel_values` or both, `(n, 3, height, width)`; changed in place.
        """
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "diffusion_pixel_values") if name in inputs}
        device = self.model.device
        keys = [f"{self.model.dtype} {device} {self._settings()} {key}" for key in keys]
        new = {key: row for row, key in enumerate(keys) if key not in self._kept}
        rows = list(new.values())
        if rows:
            given = {name: x[rows].to(device) for name, x in pixels.items()}
            self._kept.update(zip(new, self.model.encode_images(**given).rows(), strict=True))
        inputs["image_encodings"] = SDLlavaImageEncodings.cat([self._kept[key] for key in keys])
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)

    def _settings(self) -> tuple:
        """The fields of the configuration on which encodings depend, which the user may change between calls."""
        config = self.model.config.diffusion_config
        if config is None:
            return ()
        return config.noise_seed, config.timesteps, config.taps, config.needs_unconditional


class VisualQuestionAnsweringPipeline(Pipeline):
    """Answer questions about images. Several threads can use one pipeline; their batches are answered one by one.

    ```python
    >>> vqa = pipeline("visual-question-answering", model="folder-or-repository")
    >>> vqa(image="dog.jpg", question="Is the dog facing left?")
    [{"answer": "yes", "score": 0.93}]
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._kept = CachedEncodings(self.model)
        self._lock = threading.Lock()
        self._prefixes = PrefixCache()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As `Pipeline.save_pretrained`, with the processor of all encoders."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self, top_k: int | None = None, guidance_scales: Sequence[float] | float | None = None, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward = dict(generate_kwargs)
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k={top_k} is not a number of answers. Use at least 1.")
            forward.update(num_beams=top_k, num_return_sequences=top_k)
        if guidance_scales is not None:
            forward["diffusion_guidance_scales"] = guidance_scales
        return {}, forward, {}

    def __call__(self, image: Any = None, question: Any = None, **kwargs: Any) -> list:
        """Answer questions about images.

        Args:
            image: A PIL image, path, URL, base64 string, a list or dataset of them; or `{"image": ..., "question":
                ...}`, or a list, generator or dataset of such dictionaries.
            question (`str` or `list[str]`): Every question is answered for every image.
            kwargs: `top_k` (`int`): return that many answers, the beams of a beam search, best score first;
                `guidance_scales` (`list[float]`): the diffusion model's, instead of the configured ones;
                `batch_size` (`int`): questions answered at once; any argument of `generate` (default: greedy, 128 new
                tokens at most).

        Returns:
            `list[dict]`: `answer` (`str`) and `score` (`float`, the mean probability of the answer's tokens); for
            several inputs, one such list for each.

        Raises:
            TypeError: An image or question has the wrong type.
            ValueError: An image cannot be read, a question is empty, or `top_k` is below 1.
        """
        if isinstance(image, list | tuple) and not image:
            return []
        if question is None:
            return super().__call__(image, **kwargs)
        many = (list, tuple, KeyDataset)
        if not isinstance(image, many) and not isinstance(question, many):
            return super().__call__({"image": image, "question": question}, **kwargs)
        images = image if isinstance(image, many) else [image]
        questions = question if isinstance(question, many) else [question]
        pairs = [{"image": one, "question": q} for q in questions for one in images]
        return super().__call__(pairs, **kwargs) if pairs else []

    def preprocess(self, inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        """Decode the image and check the question."""
        if not isinstance(inputs, dict) or not {"image", "question"} <= set(inputs):
            raise ValueError(
                f'Input {inputs!r:.80} has no image and question. Give image= and question=, or {{"image": ..., '
                '"question": ...}.'
            )
        return {"image": load_rgb(inputs["image"]), "question": check_question(inputs["question"])}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, list]:
        with self._lock:
            return self._answers(model_inputs, generate_kwargs)

    def _answers(self, model_inputs: dict[str, Any], generate_kwargs: dict[str, Any]) -> dict[str, list]:
        images, questions = model_inputs["image"], model_inputs["question"]
        if isinstance(questions, str):
            images, questions = [images], [questions]
        inputs = self._model_inputs(images, questions).to(self.device)
        prompt_length = inputs["input_ids"].shape[1]
        options = {**_defaults(generate_kwargs), **generate_kwargs}
        if hasattr(self.model, "encode_images"):
            options["prefix_cache"] = self._prefixes
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        beams = getattr(output, "beam_indices", None)
        logprobs = self.model.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)
        generated = output.sequences[:, prompt_length:]
        answers = [self._answer(tokens, row) for tokens, row in zip(generated, logprobs, strict=True)]
        each = len(answers) // len(questions)
        by_score = [
            sorted(answers[i * each : (i + 1) * each], key=lambda a: -a["score"]) for i in range(len(questions))
        ]
        return {"answers": by_score}

    def _answer(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        special = torch.tensor(tokenizer.all_special_ids, device=tokens.device)
        is_answer = ~torch.isin(tokens, special)
        if not is_answer.any():  # an empty answer: the end token is all there is
            is_answer = torch.arange(len(tokens), device=tokens.device) == 0
        score = logprobs[: len(tokens)].float().exp()[is_answer[: len(logprobs)]].mean()
        return {"answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(), "score": float(score)}

    def postprocess(self, model_outputs: dict[str, list], **parameters: Any) -> list[dict[str, Any]]:
        """The answers about one image and question."""
        answers = model_outputs["answers"]
        return answers[0] if isinstance(answers[0], list) else answers

    def _model_inputs(self, images: Sequence[Image], questions: Sequence[str]) -> Any:
        pairs = zip(images, questions, strict=True)
        content = [[{"type": "image", "image": i}, {"type": "text", "text": q}] for i, q in pairs]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": turn}] for turn in content],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        if hasattr(self.model, "encode_images"):
            self._kept.replace_pixels(images, inputs)
        return inputs


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments of `generate` next to those that are given: greedy, at most 128 new tokens."""
    if given.get("generation_config") is not None:
        return {}
    return {"do_sample": False} | ({} if "max_length" in given else {"max_new_tokens": 128})
