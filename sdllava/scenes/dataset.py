"""Rendered scenes as training data: rows in TRL's format, and a page of examples to look at."""

import json
import os
import random
from base64 import b64encode
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from .language import KINDS, MinimalPair, Question, ask, caption, minimal_pair, sample_question
from .render import SIZE, looks_rendered, render, render_array
from .world import HELD_OUT_PAIRS, PATTERNS, SPLITS, Scene, SceneObject, sample_scene

__all__ = [
    "HELD_OUT_PAIRS", "KINDS", "PATTERNS", "SIZE", "SPLITS", "MinimalPair", "Question", "Scene", "SceneObject", "ask",
    "caption", "looks_rendered", "minimal_pair", "render", "render_array", "sample_question", "sample_scene",
    "scene_dataset", "write_examples",
]  # fmt: skip


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _row(scene: Scene, turns: list[tuple[str, str]], **extra) -> dict:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "image"}] if number == 0 else []
        content += [{"type": "text", "text": question}] if question else []
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    image = {"bytes": _png(render(scene)), "path": None}
    return {"images": [image], "messages": messages, "scene": json.dumps(scene.record()), **extra}


def _question_rows(split: str, count: int, seed: int, turns: int, patterns: Sequence[str]) -> Iterator[dict]:
    for number in range(count):
        rng = random.Random(f"row {split} {seed} {number}")
        scene, first = sample_question(split, rng.getrandbits(48), patterns)
        rest = (ask(scene, rng, patterns, held_out_only=split == "composition") for _ in range(turns - 1))
        asked = list({q.text: q for q in (first, *rest) if q}.values())
        yield _row(scene, [(q.text, q.answer) for q in asked], pattern=first.pattern)


def _caption_rows(split: str, count: int, seed: int) -> Iterator[dict]:
    for number in range(count):
        scene = sample_scene(split, random.Random(f"caption {split} {seed} {number}").getrandbits(48))
        yield _row(scene, [("", caption(scene))])


def _pair_rows(split: str, count: int, seed: int) -> Iterator[dict]:
    for number in range(count):
        pattern = PATTERNS[number % len(PATTERNS)]
        pair = minimal_pair(pattern, split, random.Random(f"pair {split} {seed} {number}").getrandbits(48))
        for scene, answer in zip(pair.scenes, pair.answers, strict=True):
            yield _row(scene, [(pair.question, answer)], pattern=pattern, pair=number)


def scene_dataset(
    split: str,
    count: int,
    seed: int = 0,
    task: str = "questions",
    turns: int = 1,
    patterns: Sequence[str] = PATTERNS,
):
    """Rendered scenes as a `datasets.Dataset` in TRL's format: `images`, `messages`, and the `scene`'s record as JSON.

    Args:
        split: "train", "validation", "test" or "composition" (scenes with a colour-shape pair never trained on).
        count: rows; for pairs, pairs of rows.
        task: "questions" (adds `pattern`), "captions", or "pairs" (adds `pattern` and `pair`, the pair's number).
        turns: the most questions on one scene, in one conversation; only for "questions".
        patterns: those that are asked about; one named twice is asked about twice as often; only for "questions".
    """
    import datasets

    rows = {
        "questions": lambda: _question_rows(split, count, seed, turns, patterns),
        "captions": lambda: _caption_rows(split, count, seed),
        "pairs": lambda: _pair_rows(split, count, seed),
    }
    if task not in rows:
        raise ValueError(f"{task!r} is no task of the scenes; the tasks are {', '.join(rows)}.")
    if count < 1 or turns < 1:
        raise ValueError(f"count and turns must be positive, not {count} and {turns}.")
    dataset = datasets.Dataset.from_list(list(rows[task]()), on_mixed_types="use_json")
    return dataset.cast_column("images", datasets.List(datasets.Image()))


def _data_url(image: Image.Image) -> str:
    enlarged = image.resize((3 * SIZE, 3 * SIZE), Image.Resampling.NEAREST)
    return f"data:image/png;base64,{b64encode(_png(enlarged)).decode()}"


def write_examples(path: str | os.PathLike, seed: int = 0, pairs_per_pattern: int = 3) -> None:
    """Writes one HTML page: minimal pairs of every pattern with captions, question and both answers."""
    body = []
    for pattern in PATTERNS:
        body.append(f"<h2>{pattern}</h2>")
        for number in range(pairs_per_pattern):
            pair = minimal_pair(pattern, "train", seed + number)
            cells = (
                f'<td><img src="{_data_url(render(scene))}" alt=""><p>{caption(scene)}</p><b>{answer}</b></td>'
                for scene, answer in zip(pair.scenes, pair.answers, strict=True)
            )
            body.append(f"<p>{pair.question}</p><table><tr>{''.join(cells)}</tr></table>")
    style = "body{font:14px sans-serif}td{width:220px;vertical-align:top}"
    page = f'<!doctype html><meta charset="utf-8"><title>Scenes</title><style>{style}</style>{"".join(body)}'
    aside = Path(f"{path}.part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
