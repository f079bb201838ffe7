"""The state of a request: its inputs, the text that it has so far, and its answer."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from .chat import ChatRequest
from .limits import RequestError


@dataclass
class Job:
    """A request with its inputs.

    Args:
        request: The checked request.
        end: When the request times out, on the clock of `time.monotonic`.
        inputs: The processor's output, of one conversation, on the CPU.
        image_keys: From [`~sdllava.pipeline.image_key`], in the order of the images.
        send: Called in the model's thread with each new piece of text.
        cancelled: Set when nobody waits for the answer any more.
    """

    request: ChatRequest
    end: float
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    image_keys: Sequence[str] = ()
    send: Callable[[str], None] = lambda text: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        """Whether the answer is not needed any more."""
        return self.cancelled.is_set() or time.monotonic() > self.end

    @property
    def length(self) -> int:
        """Tokens of the prompt, with the placeholders of images."""
        return self.inputs["input_ids"].shape[1]


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


class Row:
    """One row of a batch: sends new text, ends at its own length, end token or stop string, and then has its answer.

    Args:
        job: The job.
        max_new_tokens: Tokens of the answer.
        end_tokens: Ids of the tokens that end an answer.
        decode: Turns generated token ids into text.
    """

    def __init__(self, job: Job, max_new_tokens: int, end_tokens: Sequence[int], decode: Callable[[list[int]], str]):
        self.job, self.max_new_tokens, self.end_tokens, self.decode = job, max_new_tokens, end_tokens, decode
        self.future: Future[Answer] = Future()
        self.sent = ""

    def advance(self, tokens: list[int]) -> bool:
        """Read the tokens generated so far. Returns whether the row has ended; its answer is then in `future`."""
        if self.future.done():
            return True
        request, text = self.job.request, None
        if request.stream or request.stop:
            text = self.decode(tokens)
            held = max((len(stop) - 1 for stop in request.stop), default=0)
            if not _until_stop(text, request.stop)[1]:
                whole = text[: len(text) - held]
                if not whole.endswith("\ufffd"):  # half of a character
                    self._send(whole)
        is_stopped = text is not None and _until_stop(text, request.stop)[1]
        if is_stopped or self.job.is_over or tokens[-1] in self.end_tokens or len(tokens) >= self.max_new_tokens:
            self.finish(tokens)
        return self.future.done()

    def finish(self, tokens: list[int]) -> None:
        """Make the answer of all tokens, or the error that the time is over."""
        if self.future.done():
            return
        if self.job.is_over:
            self.future.set_exception(timeout_error())
            return
        text, is_stopped = _until_stop(self.decode(tokens), self.job.request.stop)
        self._send(text)
        is_cut = len(tokens) >= self.max_new_tokens and not is_stopped and tokens[-1] not in self.end_tokens
        self.future.set_result(Answer(text, "length" if is_cut else "stop", self.job.length, len(tokens)))

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent):
            self.job.send(text[len(self.sent) :])
            self.sent = text


def _until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether it has one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def timeout_error() -> RequestError:
    """The error of a request whose time is over (HTTP 504)."""
    return RequestError("The request took too long. Ask for fewer tokens, or try again later.", 504)


def collate(jobs: Sequence[Job], padding: dict[str, int]) -> dict[str, Any]:
    """The inputs of several jobs as one batch, with prompts padded on the left.

    Args:
        jobs: Each with the same names of inputs, apart from those of images.
        padding: Names of the inputs with one value per token of the prompt, with the value of padding.
    """
    longest = max(job.length for job in jobs)
    batch = {}
    for name in {name: None for job in jobs for name in job.inputs}:
        rows = [job.inputs[name] for job in jobs if name in job.inputs]
        if name in padding:
            rows = [pad(row, (longest - row.shape[1], 0), value=padding[name]) for row in rows]
        batch[name] = torch.cat(rows)
    return batch
