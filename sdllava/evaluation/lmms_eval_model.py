"""This package's models in lmms-eval: `lmms-eval --model sdllava --model_args pretrained=FOLDER_OR_ID --tasks mmvp`.

Needs `pip install "sdllava[lmms]"`. lmms-eval finds it through the entry point group `lmms_eval.models`.
"""

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from .benchmarks.base import Sample
from .responder import Responder, load_model

MANIFEST = ModelManifest(model_id="sdllava", chat_class_path=f"{__name__}.SDLlavaLMMS")


class SDLlavaLMMS(lmms):
    """Answers lmms-eval's requests. The diffusion model's prompt is the text of the request.

    Args:
        pretrained: Folder or Hub id of this package's models, or of any image-text-to-text model of transformers.
        revision: Branch, tag or commit on the Hub.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: None or "cuda" uses this process's accelerator, or the CPU.
        batch_size: Requests per batch.
        guidance: Guidance scale that replaces the checkpoint's.
        unknown: Other `--model_args`.

    Raises:
        ValueError: There are other `--model_args`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        guidance: float | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"Unknown --model_args {', '.join(map(repr, unknown))}. Leave them out.")
        model, processor = load_model(pretrained, revision, dtype, None if device in (None, "cuda") else device)
        self.responder = Responder(model, processor, guidance_scales=None if guidance is None else [float(guidance)])
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One reply per request, in their order.

        Raises:
            ValueError: Requests of one batch have different generation arguments.
        """
        replies = []
        for start in range(0, len(requests), self.batch_size):
            batch = [self._sample(request) for request in requests[start : start + self.batch_size]]
            generation = _generation(requests[start].args[2])
            if any(_generation(request.args[2]) != generation for request in requests[start : start + self.batch_size]):
                raise ValueError(
                    f"The {len(batch)} requests of a batch have different generation arguments. Use --batch_size 1."
                )
            questions = [[sample.question] * len(sample.images) for sample in batch]
            replies += self.responder.reply(batch, generation, questions)
        return replies

    def _sample(self, request: Instance) -> Sample:
        _, to_messages, _, doc_id, task, split = request.args
        content = [part for message in to_messages(self.task_dict[task][split][doc_id]) for part in message["content"]]
        text = "\n".join(part["text"] for part in content if part["type"] == "text")
        images = tuple(part["url"] for part in content if part["type"] == "image")
        return Sample(f"{task}-{doc_id}", text, images, question=text)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Unsupported."""
        raise NotImplementedError("sdllava does not support log-likelihood requests. Choose a generation task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Unsupported."""
        raise NotImplementedError("sdllava does not support multi-round requests. Choose a single-round task.")


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    temperature = options.get("temperature") or 0
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return {
        **sampling,
        "num_beams": options.get("num_beams") or 1,
        "max_new_tokens": options.get("max_new_tokens", 1024),
    }
