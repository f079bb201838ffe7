"""The thread that runs the model. Requests that wait are answered together, in the order in which they arrived."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from ..pipeline import CachedEncodings, image_key
from .chat import ChatRequest
from .jobs import Answer, Job, Row, collate, timeout_error
from .limits import BATCH_SECONDS, MAX_BATCH, RequestError

MIN_TEMPERATURE = 0.01
"""Lower temperatures are greedy."""
PADDING_MATTERS = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
"""Generation settings that read the padding of a prompt, with the values that turn them off."""


class Progress(StoppingCriteria):
    """Shows a batch's rows their tokens after each step, and ends each of them.

    Args:
        rows: In the order of the batch.
        length: Tokens of the padded prompts.
    """

    def __init__(self, rows: Sequence[Row], length: int):
        self.rows, self.length = rows, length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each sequence ends here, as a tensor of shape `(batch,)`."""
        if len(input_ids) != len(self.rows):  # the beams of a single request
            is_over = self.rows[0].job.is_over
            return torch.full((len(input_ids),), is_over, device=input_ids.device)
        new = input_ids[:, self.length :].tolist()
        ended = [row.advance(tokens) for row, tokens in zip(self.rows, new, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class ModelWorker:
    """Runs a model in a thread of its own.

    Greedy requests that wait at the same time form a batch. Others are answered one by one: a random number or a beam
    depends on what else is in a batch. In float32 an answer does not depend on the batch, except where two tokens have
    the same probability within rounding.

    Args:
        model: With `generate`.
        processor: The model's.
        max_batch: Requests of a batch, and images of a batch of several requests.
        batch_seconds: How long a request waits for others, where the model is free.
    """

    def __init__(self, model: Any, processor: Any, max_batch: int = MAX_BATCH, batch_seconds: float = BATCH_SECONDS):
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.batch_seconds = max_batch, batch_seconds
        self._kept = CachedEncodings(model)
        self._changed = threading.Condition()
        self._waiting: list[Row] = []
        self._executor = ThreadPoolExecutor(1, "model")
        generation = model.generation_config
        self._can_pad = all(getattr(generation, name, None) in (None, off) for name, off in PADDING_MATTERS.items())

    def prepare(self, request: ChatRequest, images: Sequence[Image], end: float) -> Job:
        """Make a job of a request. Called in any thread.

        Args:
            request: The checked request.
            images: Its decoded images, in order.
            end: When it times out, on the clock of `time.monotonic`.

        Raises:
            RequestError: The prompt cannot be made from the messages or is too long for the model (HTTP 400).
        """
        keys = [image_key(image) for image in images]
        try:
            job = Job(request, end, self._inputs(request, images), keys)
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(f"The messages do not make a prompt: {error}") from error
        if job.length >= self._longest():
            raise RequestError(
                f"The prompt has {job.length} tokens, of {self._longest()} with its answer. Send less text or fewer "
                "images."
            )
        return job

    def submit(self, job: Job) -> "Future[Answer]":
        """Answer a job. Its future raises `RequestError` where the time is over (HTTP 504)."""
        new_tokens = min(job.request.max_new_tokens, self._longest() - job.length)
        row = Row(job, new_tokens, self._end_tokens(), self._decode)
        with self._changed:
            self._waiting.append(row)
            self._changed.notify()
        self._executor.submit(self._answer_next)
        return row.future

    def _answer_next(self) -> None:
        """Answer the requests that wait, as far as they fit one batch. Where that fails, each is answered by itself."""
        rows = [row for row in self._next_batch() if row.future.set_running_or_notify_cancel()]
        if len(rows) > 1 and self._failure(rows) is None:
            return
        for row in rows:
            if (error := self._failure([row])) is not None:
                row.future.set_exception(error)

    def _failure(self, rows: Sequence[Row]) -> Exception | None:
        """Generate the answers that are missing, and return what was raised."""
        missing = [row for row in rows if not row.future.done()]
        for row in missing:
            if row.job.is_over:
                row.future.set_exception(timeout_error())
        if running := [row for row in missing if not row.future.done()]:
            try:
                self._generate(running)
            except Exception as error:
                return error
        return None

    def _next_batch(self) -> list[Row]:
        with self._changed:
            if not self._waiting:  # they were part of an earlier batch
                return []
            end = time.monotonic() + self.batch_seconds
            while self._is_batched(self._waiting[0]) and len(self._fitting()) < self.max_batch:
                if not self._changed.wait(end - time.monotonic()):
                    break
            batch = self._fitting()
            self._waiting = [row for row in self._waiting if row not in batch]
            return batch

    def _fitting(self) -> list[Row]:
        """The first request that waits, and those that can be answered together with it."""
        first, *others = self._waiting
        batch, images = [first], len(first.job.image_keys)
        for row in filter(self._is_batched, others if self._is_batched(first) else ()):
            images += len(row.job.image_keys)
            if len(batch) == self.max_batch or images > self.max_batch:
                break
            batch.append(row)
        return batch

    def _is_batched(self, row: Row) -> bool:
        options = self._options(row.job.request)
        does_sample = options.get("do_sample", self.model.generation_config.do_sample)
        return self._can_pad and options["num_beams"] == 1 and not does_sample

    def _generate(self, rows: Sequence[Row]) -> None:
        jobs = [row.job for row in rows]
        padding = {"input_ids": self.processor.tokenizer.pad_token_id or 0}
        padding = {**dict.fromkeys(self.processor.tokenizer.model_input_names, 0), **padding}
        inputs = {name: x.to(self.model.device) for name, x in collate(jobs, padding).items()}
        length = inputs["input_ids"].shape[1]
        options = self._options(jobs[0].request)
        if jobs[0].request.seed is not None:
            torch.manual_seed(jobs[0].request.seed)
        with torch.inference_mode():
            if keys := [key for job in jobs for key in job.image_keys]:
                self._kept.replace(keys, inputs)
            tokens = self.model.generate(
                **inputs,
                **options,
                max_new_tokens=max(row.max_new_tokens for row in rows),
                stopping_criteria=StoppingCriteriaList([Progress(rows, length)]),
            )
        for row, new in zip(rows, tokens[:, length:].tolist(), strict=True):
            row.finish(new)

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        """How `generate` chooses tokens."""
        temperature = 1.0 if request.temperature is None else request.temperature
        if temperature < MIN_TEMPERATURE or request.num_beams > 1:
            return {"num_beams": request.num_beams, "do_sample": False}
        if request.temperature is None and request.top_p is None:
            return {"num_beams": request.num_beams}
        return {"num_beams": 1, "do_sample": True, "temperature": temperature, "top_p": request.top_p or 1.0}

    def _inputs(self, request: ChatRequest, images: Sequence[Image]) -> dict[str, torch.Tensor]:
        remaining = iter(images)
        messages = [
            message
            if isinstance(message["content"], str)
            else {
                **message,
                "content": [
                    {"type": "image", "image": next(remaining)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in request.messages
        ]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs)

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

    def _longest(self) -> int:
        """Tokens of a prompt with its answer."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def _end_tokens(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return [] if end is None else end if isinstance(end, list) else [end]
