"""Benchmarks on the miniature's synthetic scenes: held-out scenes, held-out compositions, and minimal pairs.

The scenes are drawn from their seeds (`sdllava.scenes`), so there is nothing to download. A minimal pair
counts if its question is answered correctly on both images, as in MMVP.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...scenes.language import PATTERNS, caption, sample_question
from ...scenes.minimal_pairs import minimal_pair
from ...scenes.render import render
from ...scenes.world import Scene, sample_scene
from .base import Benchmark, Sample
from .captions import CocoCaptions
from .groups import group_means, in_groups
from .matching_base import MatchingBenchmark, MatchingItem

QUESTIONS = 1800
COMPOSITIONS = 900
PAIRS_PER_PATTERN = 50
CAPTIONS = 500
PARTS = ("questions", "compositions", "pairs")


class Mini(Benchmark):
    """Questions on held-out scenes and compositions, and minimal pairs. Scores by part and by visual pattern."""

    name = "mini"
    hub_id = ""
    split = "test"
    metric = "questions"
    max_new_tokens = 8
    protocols = {"default": "greedy, only the question, exact equality after lower-casing and trailing full stops"}

    def read(self, folder: Path | None) -> list[Sample]:
        """All questions of the three parts. The images are rendered here and `folder` is ignored."""
        samples = [
            *_questions("questions", "test", QUESTIONS),
            *_questions("compositions", "composition", COMPOSITIONS),
            *_pairs(),
        ]
        answers = defaultdict(set)
        for sample in samples:
            answers[sample.info["kind"]].add(sample.target)
        for sample in samples:
            sample.info["num_answers"] = len(answers[sample.info["kind"]])
        return samples

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The reply in lower case without trailing full stops, or None if nothing is left."""
        return reply.strip().rstrip(".").lower() or None

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The verdict on each question, and on each minimal pair (both correct), by part and pattern."""
        verdicts = defaultdict(list)
        for record in records:
            verdicts[record["part"], record["pattern"], record.get("pair", record["id"])].append(record["correct"])
        units = {}
        for (part, pattern, name), correct in verdicts.items():
            if part == "pairs" and len(correct) != 2:
                continue
            value = math.prod(map(float, correct)) if part == "pairs" else float(correct[0])
            units[f"{part} {name}"] = in_groups((part, f"{part}/{pattern}"), correct=value)
        return units

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Accuracy of each part and of each pattern in it, in percent."""
        groups = group_means(means, "correct")
        return {group: 100.0 * groups[group] for group in sorted(groups, key=_order)}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """Uniform guessing among all answers to that kind of question, two guesses for pairs."""
        return self.score([{**record, "correct": 1.0 / record["num_answers"]} for record in records])


def _questions(part: str, split: str, count: int) -> list[Sample]:
    samples = []
    for seed in range(count):
        scene, question = sample_question(split, seed)
        info = {"part": part, "pattern": question.pattern, "kind": question.kind}
        samples.append(_sample(f"{part}-{seed}", scene, question.text, question.answer, info))
    return samples


def _pairs() -> list[Sample]:
    samples = []
    for seed in range(PAIRS_PER_PATTERN):
        for pattern in PATTERNS:
            pair = minimal_pair(pattern, "test", seed)
            for side in (0, 1):
                info = {
                    "part": "pairs",
                    "pattern": pattern,
                    "kind": f"pair {pattern}",
                    "pair": f"{pattern}-{seed}",
                }
                name = f"pairs-{pattern}-{seed}-{side}"
                samples.append(_sample(name, pair.scenes[side], pair.question, pair.answers[side], info))
    return samples


def _sample(name: str, scene: Scene, text: str, answer: str, info: dict[str, Any]) -> Sample:
    return Sample(
        id=name, prompt=text, images=(_image(scene),), target=answer, question=text, image_ids=(name,), info=info
    )


def _image(scene: Scene) -> Callable[[], Image.Image]:
    return partial(render, scene)


def _order(group: str) -> tuple[bool, int, str]:
    return "/" in group, PARTS.index(group.split("/")[0]), group


class MiniCaptions(CocoCaptions):
    """Held-out scenes with one caption each: captioning and leakage on synthetic scenes."""

    name = "mini_captions"
    hub_id = ""

    def read(self, folder: Path | None) -> list[Sample]:
        """All scenes. The images are rendered here and `folder` is ignored."""
        scenes = {f"scene-{seed}": sample_scene("test", seed) for seed in range(CAPTIONS)}
        return [self.sample(name, [caption(scene)], _image(scene)) for name, scene in scenes.items()]


class MiniPairs(MatchingBenchmark):
    """The two scenes of each minimal pair, each with its own caption."""

    name = "mini_pairs"
    hub_id = ""

    def read(self, folder: Path | None) -> list[MatchingItem]:
        """Minimal pairs with a caption for each image. The images are rendered here and `folder` is ignored."""
        items = []
        for pattern in PATTERNS:
            for seed in range(PAIRS_PER_PATTERN):
                first, second = minimal_pair(pattern, "test", seed).scenes
                items.append(
                    MatchingItem(
                        id=f"{pattern}-{seed}",
                        images=(_image(first), _image(second)),
                        texts=(caption(first), caption(second)),
                        info={"pattern": pattern},
                    )
                )
        return items
