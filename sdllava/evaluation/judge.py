"""Judges: an OpenAI-compatible endpoint or a local model of transformers, at the temperature of the benchmark."""

import copy
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..repositories import require_safetensors
from .processes import default_device

TEMPERATURE = 0.2
"""As in LLaVA-Bench and MMVP. A benchmark can choose another one."""
MAX_TOKENS = 1024
MAX_COMPLETION_TOKENS = 8192
"""For models that require `max_completion_tokens`. Their reasoning counts towards it."""

ATTEMPTS = 5
LONGEST_WAIT = 60.0
PASSING = (408, 409, 425, 429)
"""Statuses in the range 4xx that another attempt can change."""

KEPT = "The replies are kept: run the same command again to judge them."


class Judge(Protocol):
    """Rates or grades replies. `name` is recorded in the results, `temperature` with each judgement."""

    name: str

    @property
    def temperature(self) -> float | None:
        """The temperature of the last reply. None if it is unknown."""

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply to a system message (possibly empty) and a user message."""

    def with_temperature(self, temperature: float) -> "Judge":
        """The same judge at this temperature, which its name contains. At 0 it is greedy."""


class JudgeRejectionError(ConnectionError):
    """The endpoint rejected a request in a way that another attempt cannot change, for example a wrong key."""


class EndpointJudge:
    """A model at `POST {url}/chat/completions`.

    Requests have `max_tokens` and `temperature`. If the endpoint rejects one of them by name, the request is repeated
    with `max_completion_tokens`, or without a temperature, and so are later ones. Failures that may pass (no
    connection, HTTP 408, 409, 425, 429 and 5xx, damaged replies) are repeated at most `ATTEMPTS` times.

    Args:
        model: The endpoint's name of the model, for example gpt-4-0314.
        url: The base address, for example https://api.openai.com/v1.
        key: Sent as a bearer token. None uses the environment variable OPENAI_API_KEY, if it is set.
        wait: Seconds before the second attempt. Later attempts wait longer, or as long as the header Retry-After says,
            at most `LONGEST_WAIT`.

    Raises:
        ValueError: The address is not an HTTP URL.
    """

    def __init__(self, model: str, url: str, key: str | None = None, wait: float = 2.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The judge's address {url!r} is not an http or https URL. Correct --judge-url.")
        self.model, self.url, self.wait = model, url.rstrip("/"), wait
        self.key = key or os.environ.get("OPENAI_API_KEY")
        self.name = f"{model} at {self.url}, temperature {TEMPERATURE}"
        self.settings: dict[str, float] = {"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
        local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._open = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else [])).open

    def with_temperature(self, temperature: float) -> "EndpointJudge":
        """The same judge at this temperature."""
        other = copy.copy(self)
        other.name = f"{self.model} at {self.url}, temperature {temperature}"
        other.settings = {**self.settings, "temperature": temperature}
        return other

    @property
    def temperature(self) -> float | None:
        """The temperature of the last reply. None if the endpoint only accepts its own."""
        return self.settings.get("temperature")

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply, empty if the endpoint returns none.

        Raises:
            JudgeRejectionError: The endpoint rejected the request.
            ConnectionError: The endpoint failed in every attempt.
        """
        settings, failures = dict(self.settings), 0
        while True:
            try:
                reply = self._request({"model": self.model, "messages": _messages(system, user), **settings})
            except urllib.error.HTTPError as error:
                status, body = error.code, error.read().decode("utf-8", errors="replace")
                changed = _without_rejected(settings, body) if status in (400, 422) else None
                if changed is not None:
                    settings = changed
                    continue
                reason = f"HTTP {status}: {body[:300].strip()}"
                if (status not in PASSING and status < 500) or "insufficient_quota" in body:
                    raise JudgeRejectionError(
                        f"The judge {self.model!r} at {self.url!r} rejected the request ({reason}). Correct the name, "
                        f"the address or the key. {KEPT}"
                    ) from error
                pause = _retry_after(error)
            except (OSError, http.client.HTTPException, KeyError, IndexError, TypeError, ValueError) as error:
                reason, pause = repr(error), None
            else:
                self.settings = settings
                return reply
            failures += 1
            if failures == ATTEMPTS:
                raise ConnectionError(
                    f"The judge {self.model!r} at {self.url!r} did not answer in {ATTEMPTS} attempts ({reason}). {KEPT}"
                )
            time.sleep(self.wait * failures if pause is None else pause)

    def _request(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with self._open(request, timeout=300) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
            return without_thinking(content or "")  # null if the model refuses


def _without_rejected(settings: dict[str, float], error: str) -> dict[str, float] | None:
    """The settings without the one that an error message names, or None if it names none of them."""
    try:
        found = json.loads(error)["error"]["param"] or error
    except (ValueError, KeyError, TypeError):
        found = error
    if "max_tokens" in settings and "max_tokens" in found:
        changed = {name: value for name, value in settings.items() if name != "max_tokens"}
        return {**changed, "max_completion_tokens": MAX_COMPLETION_TOKENS}
    if "temperature" in settings and "temperature" in found:
        return {name: value for name, value in settings.items() if name != "temperature"}
    return None


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """The seconds of the header Retry-After, at most `LONGEST_WAIT`. None without a number."""
    value = error.headers.get("Retry-After", "")
    return min(float(value), LONGEST_WAIT) if value.isdecimal() else None


class LocalJudge:
    """A chat model of transformers on this machine. Its sampling is seeded, so that judgements are reproducible.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        device: None uses this process's accelerator, or the CPU.

    Raises:
        ValueError: The model has no chat template, or its weights are pickles.
    """

    temperature = TEMPERATURE

    def __init__(self, model: str, revision: str | None = None, device: str | torch.device | None = None):
        require_safetensors(f"{model}@{revision}" if revision else model)
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"The judge {model!r} has no chat template. Choose an instruction-tuned model.")
        self.model = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="auto", use_safetensors=True)
        self.model.to(device or default_device()).eval()
        self._source = model
        self.name = f"{model} (local), temperature {TEMPERATURE}"

    def with_temperature(self, temperature: float) -> "LocalJudge":
        """The same judge at this temperature, with the same weights in memory."""
        other = copy.copy(self)
        other.name, other.temperature = f"{self._source} (local), temperature {temperature}", temperature
        return other

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply."""
        inputs = self.tokenizer.apply_chat_template(
            _messages(system, user),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # templates without this switch ignore it
        ).to(self.model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        torch.manual_seed(0)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **sampling, max_new_tokens=MAX_TOKENS)
        reply = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return without_thinking(reply).strip()


def without_thinking(reply: str) -> str:
    """A reply without the block `<think>...</think>` at its beginning."""
    return re.sub(r"\A\s*<think>.*?</think>\s*", "", reply, flags=re.DOTALL)


def make_judge(model: str | None, url: str | None = None) -> Judge | None:
    """A judge from the command line's options, None without a model.

    Args:
        model: Name at the endpoint, or folder or Hub id of a local model.
        url: Address of the endpoint. None loads a local model.

    Raises:
        ValueError: There is an address without a model's name.
    """
    if model is None:
        if url is not None:
            raise ValueError(f"--judge-url {url!r} needs the name of the judge at that address. Add --judge MODEL.")
        return None
    return EndpointJudge(model, url) if url else LocalJudge(model)


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
