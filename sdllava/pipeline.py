"""`pipeline("visual-question-answering")`, as transformers 4 had it, for vision-language models."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from transformers import Pipeline
from transformers.pipelines.pt_utils import KeyDataset

from .image_loading import load_rgb
from .modeling_sdllava import SDLlavaImageEncodings

NUM_KEPT_IMAGES = 8
"""How many images' encodings are kept, so that a follow-up question costs one conditional pass."""


class KeptEncodings:
    """What a model computed of the images that it saw last, and that does not depend on the question."""

    def __init__(self, model: Any, size: int = NUM_KEPT_IMAGES):
        self.model, self.size = model, size
        self._kept: OrderedDict[str, SDLlavaImageEncodings] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def replace_pixels(self, images: Sequence[Image], inputs: Any) -> None:
        """Put `image_encodings` in the place of the pixels in a processor's output; each new image is encoded once.

        Args:
            images: as they were given to the processor, in order.
            inputs: with `pixel_values`, `diffusion_pixel_values` or both, `(n, 3, height, width)`; changed in place.
        """
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "diffusion_pixel_values") if name in inputs}
        device = self.model.device
        weights = f"{self.model.dtype} {device} "
        keys = [weights + hashlib.sha256(repr(i.size).encode() + i.tobytes()).hexdigest() for i in images]
        new = {key: row for row, key in enumerate(keys) if key not in self._kept}
        rows = list(new.values())
        if rows:
            given = {name: x[rows].to(device) for name, x in pixels.items()}
            self._kept.update(zip(new, self.model.encode_images(**given).rows()))
        inputs["image_encodings"] = SDLlavaImageEncodings.cat([self._kept[key] for key in keys])
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)


def check_question(question: Any) -> str:
    """Raises:
    TypeError, ValueError: the question is no text, or empty.
    """
    if not isinstance(question, str):
        raise TypeError(f"a question must be text, not {question!r}")
    if not question.strip():
        raise ValueError(f"the question {question!r} is empty: ask something about the image")
    return question


class VisualQuestionAnsweringPipeline(Pipeline):
    """Answer questions about images.

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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = KeptEncodings(self.model)

    def _sanitize_parameters(self, top_k: int | None = None, guidance_scales=None, **generate_kwargs):
        forward = dict(generate_kwargs)
        if top_k is not None:
            if top_k < 1:
                raise ValueError(f"top_k is the number of answers, at least 1, not {top_k}")
            forward.update(num_beams=top_k, num_return_sequences=top_k)
        if guidance_scales is not None:
            forward["diffusion_guidance_scales"] = guidance_scales
        return {}, forward, {}

    def __call__(self, image=None, question=None, **kwargs) -> list:
        """Args:
            image: a PIL image, path, URL, base64 string, a list or dataset of them; or `{"image": ..., "question":
                ...}`, or a list, generator or dataset of such dictionaries.
            question (`str` or `list[str]`): each is asked about each image.
            top_k (`int`): return that many answers, the beams of a beam search, best score first.
            guidance_scales (`list[float]`): the diffusion model's, instead of the configured ones.
            batch_size (`int`): questions answered at once.
            generate_kwargs: any argument of `generate`; default greedy, 128 new tokens at most.

        Returns:
            `list[dict]`: `answer` (`str`) and `score` (`float`, the mean probability of the answer's tokens); for
            several inputs, one such list for each.
        """
        if question is None:
            return super().__call__(image, **kwargs)
        many = (list, tuple, KeyDataset)
        if not isinstance(image, many) and not isinstance(question, many):
            return super().__call__({"image": image, "question": question}, **kwargs)
        images = image if isinstance(image, many) else [image]
        questions = question if isinstance(question, many) else [question]
        pairs = [{"image": one, "question": q} for q in questions for one in images]
        return super().__call__(pairs, **kwargs)

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, dict) or not {"image", "question"} <= set(inputs):
            raise ValueError(f'give image= and question=, or {{"image": ..., "question": ...}}, not {inputs!r:.80}')
        return {"image": load_rgb(inputs["image"]), "question": check_question(inputs["question"])}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs) -> dict[str, list]:
        images, questions = model_inputs["image"], model_inputs["question"]
        if isinstance(questions, str):
            images, questions = [images], [questions]
        inputs = self._model_inputs(images, questions).to(self.device)
        prompt_length = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 128, "do_sample": False, **generate_kwargs}
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        beams = getattr(output, "beam_indices", None)
        logprobs = self.model.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)
        generated = output.sequences[:, prompt_length:]
        answers = [self._answer(tokens, row) for tokens, row in zip(generated, logprobs)]
        each = len(answers) // len(questions)
        by_score = [
            sorted(answers[i * each : (i + 1) * each], key=lambda a: -a["score"]) for i in range(len(questions))
        ]
        return {"answers": by_score}

    def _answer(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        special = torch.tensor(tokenizer.all_special_ids, device=tokens.device)
        said = ~torch.isin(tokens, special)
        if not said.any():  # an empty answer: the end token is all there is
            said = torch.arange(len(tokens), device=tokens.device) == 0
        score = logprobs[: len(tokens)].float().exp()[said[: len(logprobs)]].mean()
        return {"answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(), "score": float(score)}

    def postprocess(self, model_outputs: dict[str, list]) -> list[dict[str, Any]]:
        answers = model_outputs["answers"]
        return answers[0] if isinstance(answers[0], list) else answers

    def _model_inputs(self, images: Sequence, questions: Sequence[str]):
        content = [[{"type": "image", "image": i}, {"type": "text", "text": q}] for i, q in zip(images, questions)]
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
