"""Rendered scenes as training data in TRL's format, and an HTML page of examples."""

import json
import os
import random
from base64 import b64encode
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..atomic_files import write_text
from .language import ask, caption, describe_request, sample_question
from .minimal_pairs import minimal_pair
from .render import SIZE, render
from .world import PATTERNS, Scene, sample_scene

if TYPE_CHECKING:
    from datasets import Dataset


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _row(scene: Scene, turns: list[tuple[str, str]], **extra: Any) -> dict[str, Any]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content: list[dict[str, str]] = [{"type": "image"}] if number == 0 else []
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
        unique = {question.text: question.answer for question in (first, *rest) if question}
        yield _row(scene, list(unique.items()), pattern=first.pattern)


def _caption_rows(split: str, count: int, seed: int) -> Iterator[dict]:
    for number in range(count):
        scene = sample_scene(split, random.Random(f"caption {split} {seed} {number}").getrandbits(48))
        yield _row(scene, [("", caption(scene))])


def _description_rows(split: str, count: int, seed: int) -> Iterator[dict]:
    for number in range(count):
        rng = random.Random(f"description {split} {seed} {number}")
        scene = sample_scene(split, rng.getrandbits(48))
        yield _row(
            scene, [describe_request(scene, item, rng) for item in rng.sample(scene.objects, len(scene.objects))]
        )


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
) -> "Dataset":
    """Rendered scenes as a dataset in TRL's format: `images`, `messages`, and `scene` (the scene's record as JSON).

    Args:
        split: "train", "validation", "test", "composition" (scenes with a held-out colour-shape pair) or "varied" (with
            further colours and shapes).
        count: The number of rows. For "pairs", the number of pairs of rows.
        seed: Other seeds give other scenes of the split.
        task: "questions" (adds `pattern`), "captions", "descriptions" (one turn per object), or "pairs" (adds `pattern`
            and `pair`, the pair's number).
        turns: For "questions", the largest number of questions about a scene, in one conversation.
        patterns: For "questions", the patterns to ask about. A pattern that is named twice is twice as frequent.

    Raises:
        ValueError: `split` or `task` is unknown, or `count` or `turns` is below 1.
    """
    import datasets

    rows = {
        "questions": lambda: _question_rows(split, count, seed, turns, patterns),
        "captions": lambda: _caption_rows(split, count, seed),
        "descriptions": lambda: _description_rows(split, count, seed),
        "pairs": lambda: _pair_rows(split, count, seed),
    }
    if task not in rows:
        raise ValueError(f"Task {task!r} is unknown. Use one of {', '.join(rows)}.")
    if count < 1 or turns < 1:
        raise ValueError(f"Count {count} with {turns} turns gives no rows. Use positive numbers.")
    dataset = datasets.Dataset.from_list(list(rows[task]()), on_mixed_types="use_json")
    return dataset.cast_column("images", datasets.List(datasets.Image()))


def _data_url(image: Image.Image) -> str:
    enlarged = image.resize((3 * SIZE, 3 * SIZE), Image.Resampling.NEAREST)
    return f"data:image/png;base64,{b64encode(_png(enlarged)).decode()}"


def write_examples(path: str | os.PathLike, seed: int = 0, pairs_per_pattern: int = 3) -> None:
    """Write an HTML page of minimal pairs of every pattern, with captions, question and both answers."""
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
    head = f'<!doctype html><meta charset="utf-8"><title>Scenes</title><style>{style}</style>'
    write_text(path, head + "".join(body))
