"""Inference Endpoints: this file is pushed as `handler.py`, with a `requirements.txt`.

It runs on the endpoint without the package `sdllava`: the model's code comes from the repository.
"""

import base64
from typing import Any

REQUIREMENTS = "transformers>=5.20.2,<6\ndiffusers>=0.36,<1\naccelerate>=1.10\nsentencepiece>=0.2\n"


class EndpointHandler:
    """Answers questions about images.

    Args:
        path: The folder of the repository.
    """

    def __init__(self, path: str = ""):
        import torch
        from transformers import pipeline

        has_gpu = torch.cuda.is_available()
        self.pipeline = pipeline(
            "visual-question-answering",
            model=path,
            trust_remote_code=True,
            device=0 if has_gpu else "cpu",
            dtype="bfloat16" if has_gpu else "float32",
        )

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer one request.

        Args:
            data: `{"inputs": {"image": ..., "question": ...}, "parameters": {...}}`. The image is base64, also with
                line breaks or as a data URL, or a `PIL.Image.Image`. The parameters are those of the pipeline, such as
                `max_new_tokens`.

        Returns:
            `list[dict]`: `[{"answer": ..., "score": ...}]`.

        Raises:
            ValueError: The image or the question is missing, the image is not base64 of an image file, or the question
                is empty.
        """
        inputs = data.get("inputs")
        if not isinstance(inputs, dict) or not {"image", "question"} <= inputs.keys():
            raise ValueError(f"The request has the inputs {inputs!r:.100}. Give an object with image and question.")
        image = inputs["image"]
        if isinstance(image, str):
            image = _decoded(image)
        return self.pipeline(image=image, question=inputs["question"], **data.get("parameters") or {})


def _decoded(image: str) -> bytes:
    """The bytes of a base64 string or a data URL. Paths and other URLs raise, so that a request reads no file."""
    try:
        return base64.b64decode("".join(image.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise ValueError(f"Image {image!r:.60} is not base64 ({error}). Encode the bytes of its file.") from error
