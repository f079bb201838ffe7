"""The thread that runs the model: one request at a time, in the order in which they arrived."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from ..pipeline import CachedEncodings
from .chat import ChatRequest
from .limits import RequestError

MIN_TEMPERATURE = 0.01
"""Lower temperatures are greedy."""


@dataclass
class Job:
    """A request with its images.

    Args:
        request: The checked request.
        images: Its images, in order.
        end: When the request times out, on the clock of `time.monotonic`.
        send: Called in the model's thread with each new piece of text.
        cancelled: Set when nobody waits for the answer any more.
    """

    request: ChatRequest
    images: Sequence[Image]
    end: float
    send: Callable[[str], None] = lambda text: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        """Whether the answer is not needed any more."""
        return self.cancelled.is_set() or time.monotonic() > self.end


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Args:
        text: Without stop strings.
        finish_reason: "stop", or "length" where the number of tokens ended it.
        prompt_tokens: Tokens of the prompt, with the placeholders of images.
        completion_tokens: Generated tokens.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Progress(StoppingCriteria):
    """Follows the generation token by token: sends new text, and ends it at a stop string or when the job is over.

    Args:
        job: The job.
        decode: Turns generated token ids into text.
        prompt_length: Tokens of the prompt.
    """

    def __init__(self, job: Job, decode: Callable[[Any], str], prompt_length: int):
        self.job, self.decode, self.prompt_length = job, decode, prompt_length
        self.sent, self.is_stopped = "", False
        self.held = max((len(stop) - 1 for stop in job.request.stop), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each sequence ends here, as a tensor of shape `(batch,)`."""
        if self.job.request.num_beams == 1 and (self.job.request.stream or self.job.request.stop):
            text = self.until_stop(self.decode(input_ids[0, self.prompt_length :]))
            whole = text if self.is_stopped else text[: len(text) - self.held]
            if not whole.endswith("\ufffd"):  # half of a character
                self.send(whole)
        is_done = self.is_stopped or self.job.is_over
        return torch.full((len(input_ids),), is_done, device=input_ids.device)

    def until_stop(self, text: str) -> str:
        """The text before the first stop string."""
        places = [place for stop in self.job.request.stop if (place := text.find(stop)) >= 0]
        self.is_stopped = self.is_stopped or bool(places)
        return text[: min(places)] if places else text

    def send(self, text: str) -> None:
        """Send what was not sent yet."""
        if len(text) > len(self.sent):
            self.job.send(text[len(self.sent) :])
            self.sent = text


class ModelWorker:
    """Runs a model in a thread of its own.

    Args:
        model: With `generate`.
        processor: The model's.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor
        self._kept = CachedEncodings(model)
        self.executor = ThreadPoolExecutor(1, "model")

    def answer(self, job: Job) -> Answer:
        """Answer a request. Called in the thread of `executor`.

        Raises:
            RequestError: The prompt cannot be made from the messages (HTTP 400), is too long for the model (HTTP 400),
                or the time is over (HTTP 504).
        """
        if job.is_over:
            raise _timeout()
        request = job.request
        try:
            inputs = self._inputs(job)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(f"The messages do not make a prompt: {error}") from error
        length = inputs["input_ids"].shape[1]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        if length >= longest:
            raise RequestError(
                f"The prompt has {length} tokens, of {longest} with its answer. Send less text or fewer images."
            )
        new_tokens = min(request.max_new_tokens, longest - length)
        progress = Progress(job, lambda tokens: self.processor.decode(tokens, skip_special_tokens=True), length)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "num_beams": request.num_beams}
        temperature = 1.0 if request.temperature is None else request.temperature
        if temperature < MIN_TEMPERATURE or request.num_beams > 1:
            options["do_sample"] = False
        elif request.temperature is not None or request.top_p is not None:
            options |= {"do_sample": True, "temperature": temperature, "top_p": request.top_p or 1.0}
        if request.seed is not None:
            torch.manual_seed(request.seed)
        with torch.inference_mode():
            if job.images:
                self._kept.replace_pixels(job.images, inputs)
            tokens = self.model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([progress]))
        if job.is_over:
            raise _timeout()
        new = tokens[0, length:]
        text = progress.until_stop(self.processor.decode(new, skip_special_tokens=True))
        progress.send(text)
        is_cut = len(new) == new_tokens and not progress.is_stopped and int(new[-1]) not in self._ends()
        return Answer(text, "length" if is_cut else "stop", length, len(new))

    def _inputs(self, job: Job) -> Any:
        images = iter(job.images)
        messages = [
            message
            if isinstance(message["content"], str)
            else {
                **message,
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in job.request.messages
        ]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return inputs.to(self.model.device)

    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return [] if end is None else end if isinstance(end, list) else [end]


def _timeout() -> RequestError:
    return RequestError("The request took too long. Ask for fewer tokens, or try again later.", 504)
