"""Judges: an OpenAI-compatible endpoint or a local model of transformers, at temperature 0.2 as in the papers."""

import json
import os
import time
import urllib.error
import urllib.request
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .processes import default_device

TEMPERATURE = 0.2
MAX_TOKENS = 1024
ATTEMPTS = 5


class Judge(Protocol):
    """Rates or grades replies. `name` is recorded in the results."""

    name: str

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply to a system message (possibly empty) and a user message."""


class EndpointJudge:
    """A model at `POST {url}/chat/completions`.

    Args:
        model: The endpoint's name of the model, for example gpt-4-0314.
        url: The base address, for example https://api.openai.com/v1.
        key: Sent as a bearer token. None uses the environment variable OPENAI_API_KEY, if it is set.
        wait: Seconds before the second attempt. Later attempts wait longer.

    Raises:
        ValueError: The address is not an HTTP URL.
    """

    def __init__(self, model: str, url: str, key: str | None = None, wait: float = 2.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The judge's address {url!r} is not an http or https URL. Correct --judge-url.")
        self.model, self.url, self.wait = model, url.rstrip("/"), wait
        self.key = key or os.environ.get("OPENAI_API_KEY")
        self.name = f"{model} at {self.url}, temperature {TEMPERATURE}"

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply, empty if the endpoint returns none.

        Raises:
            ConnectionError: The endpoint failed in every attempt, or rejected the request.
        """
        body = {
            "model": self.model,
            "messages": _messages(system, user),
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    return json.load(response)["choices"][0]["message"]["content"] or ""  # null if the model refuses
            except (urllib.error.URLError, TimeoutError, KeyError, IndexError, ValueError) as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404)
                if final or attempt == ATTEMPTS:
                    raise ConnectionError(
                        f"The judge {self.model!r} at {self.url!r} did not answer ({error}). The replies are kept: run "
                        "the same command again to judge them."
                    ) from error
                time.sleep(self.wait * attempt)
        raise AssertionError("unreachable")


class LocalJudge:
    """A chat model of transformers on this machine. Its sampling is seeded, so that judgements are reproducible.

    Args:
        model: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        device: None uses this process's accelerator, or the CPU.

    Raises:
        ValueError: The model has no chat template.
    """

    def __init__(self, model: str, revision: str | None = None, device: str | torch.device | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"The judge {model!r} has no chat template. Choose an instruction-tuned model.")
        self.model = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="auto")
        self.model.to(device or default_device()).eval()
        self.name = f"{model} (local), temperature {TEMPERATURE}"

    def __call__(self, system: str, user: str) -> str:
        """The judge's reply."""
        inputs = self.tokenizer.apply_chat_template(
            _messages(system, user), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        torch.manual_seed(0)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=MAX_TOKENS
            )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


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
