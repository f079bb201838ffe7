"""Visitors of the demo page at the same time: `python tests/faults/page_load.py --model mini --visitors 100`.

Each uploads an image, asks about it and reads both answers, as a browser does; one of twenty uploads a bad file.
Prints, as JSON, the number of each outcome, the seconds, and the largest displayed position in the queue. Answers
must equal those of the model without the page.
"""

import argparse
import asyncio
import json
import socket
import time
import uuid
from collections import Counter
from dataclasses import replace

import httpx
from image_mutations import encoded, png

import sdllava
from sdllava.demo.engine import Engine
from sdllava.demo.page import launch
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render
from sdllava.serving.limits import PAGE_LIMITS

NUM_SCENES = 12
BAD = (b"rubbish" * 99, png(30_000, 30_000, b""), png(1, 20_000, bytes(40_000)))
MESSAGES = ("is not an image that Pillow can read", "may be a decompression bomb", "is too thin")


class Visitor:
    """One session of the page.

    Args:
        client: Connected to the page.
        functions: The indices of the page's events, by their Python names, in order.
    """

    def __init__(self, client: httpx.AsyncClient, functions: dict[str, int]):
        self.client, self.functions = client, functions
        self.session = uuid.uuid4().hex
        self.position = 0

    async def call(self, name: str, *data) -> dict:
        """Trigger an event and wait for its outcome, a dictionary with `success` and `output`."""
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        joined = await self.client.post("gradio_api/queue/join", json=body)
        joined.raise_for_status()
        address = f"gradio_api/queue/data?session_hash={self.session}"
        async with self.client.stream("GET", address) as events:
            async for line in events.aiter_lines():
                event = json.loads(line[len("data: ") :]) if line.startswith("data: ") else {}
                if event.get("msg") == "estimation":
                    self.position = max(self.position, event["rank"] + 1)
                if event.get("msg") == "process_completed" and event["event_id"] == joined.json()["event_id"]:
                    return event
        raise ConnectionError(f"The events of {name!r} ended.")

    async def upload(self, data: bytes) -> dict:
        """Upload a file, and open it as the session's image."""
        uploaded = await self.client.post("gradio_api/upload", files={"files": ("image.png", data)})
        file = {"path": uploaded.json()[0], "orig_name": "image.png", "meta": {"_type": "gradio.FileData"}}
        return await self.call("upload", [file])


async def visit(address: str, visitors: int, images: list[bytes], questions: list[str], expected: list) -> dict:
    options = {"trust_env": False, "timeout": 3600, "limits": httpx.Limits(max_connections=None)}
    async with httpx.AsyncClient(base_url=address, **options) as client:
        events = (await client.get("config")).json()["dependencies"]
        functions: dict[str, int] = {}
        for event in events:
            functions.setdefault(event["api_name"], event["id"])

        async def one(number: int) -> tuple[str, int]:
            visitor, scene = Visitor(client, functions), number % NUM_SCENES
            if number % 20 == 7:
                event = await visitor.upload(BAD[number // 20 % len(BAD)])
                is_right = MESSAGES[number // 20 % len(BAD)] in json.dumps(event["output"])
                return ("bad upload, message" if is_right else f"bad upload: {event}"), visitor.position
            opened = await visitor.upload(images[scene])
            reply = await visitor.call("ask", None, questions[scene], 4.0, 0)
            history = {"headers": [], "data": [], "metadata": None}
            answered = await visitor.call("answers", None, None, 4.0, history)
            if not (opened["success"] and reply["success"] and answered["success"]):
                return f"failed: {answered if reply['success'] else reply}"[:300], visitor.position
            _, history, _ = answered["output"]["data"]
            is_right = history["data"] == [[questions[scene], "4", *expected[scene]]]
            return ("answered, right" if is_right else f"wrong: {answered['output']}"[:300]), visitor.position

        began = time.monotonic()
        outcomes = await asyncio.gather(*map(one, range(visitors)))
    seconds = time.monotonic() - began
    positions = [position for _, position in outcomes]
    return {"outcomes": dict(Counter(name for name, _ in outcomes)), "seconds": seconds, "position": max(positions)}


def load_page(model: str, visitors: int, max_tokens: int = PAGE_LIMITS.max_new_tokens) -> dict:
    """Open the page of a model and let visitors use it.

    Args:
        model: Folder or repository id, or `mini`.
        visitors: Their number.
        max_tokens: Tokens of an answer.

    Returns:
        `dict`: `outcomes`, `seconds` and `position`; see the module.
    """
    sdllava.register()
    limits = replace(PAGE_LIMITS, max_new_tokens=max_tokens)
    engine = Engine.from_pretrained(str(sdllava.mini_path()) if model == "mini" else model, "cpu", limits=limits)
    drawn = [sample_question("test", seed) for seed in range(NUM_SCENES)]
    expected = []
    for scene, question in drawn:
        image = engine.encode([render(scene)])
        fused = list(engine.answer(image, question.text, 4.0))[-1]
        expected.append([fused, list(engine.answer_without_diffusion(image, question.text))[-1]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = launch(engine, port=port, block=False)
    try:
        images = [encoded(render(scene), "PNG") for scene, _ in drawn]
        questions = [question.text for _, question in drawn]
        return asyncio.run(visit(blocks.local_url, visitors, images, questions, expected))
    finally:
        blocks.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--visitors", type=int, default=100)
    given = parser.parse_args()
    print(json.dumps(load_page(given.model, given.visitors), indent=1))
