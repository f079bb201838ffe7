"""The miniature's own world: questions on held-out scenes, on held-out compositions, and minimal pairs.

The scenes are drawn from their seeds (`sdllava.scenes.language`), so there is nothing to fetch. A minimal pair
counts when its question is answered rightly on both images, as in MMVP.
"""

from collections import defaultdict
from pathlib import Path

from .base import Benchmark, Sample
from .captions import CocoCaptions
from .matching_base import MatchingBenchmark, MatchingItem

QUESTIONS = 1800
COMPOSITIONS = 900
PAIRS_PER_PATTERN = 50
CAPTIONS = 500


class Mini(Benchmark):
    name = "mini"
    hub_id = ""
    split = "test"
    metric = "questions"
    max_new_tokens = 8
    protocols = {"default": "greedy, the bare question, exact equality after lower-casing and trailing full stops"}

    def read(self, folder: Path | None) -> list[Sample]:
        """Held-out scenes, held-out compositions and minimal pairs, rendered here; `folder` is not read."""
        from ...scenes.language import PATTERNS, minimal_pair, sample_question
        from ...scenes.render import render

        def sample(name, part, scene, pattern, kind, text, answer, **info):
            return Sample(
                id=name,
                prompt=text,
                images=(lambda: render(scene),),
                target=answer,
                question=text,
                image_ids=(name,),
                info={"part": part, "pattern": pattern, "kind": kind, **info},
            )

        samples = []
        for part, split, count in (("questions", "test", QUESTIONS), ("compositions", "composition", COMPOSITIONS)):
            for seed in range(count):
                scene, asked = sample_question(split, seed)
                name = f"{part}-{seed}"
                samples.append(sample(name, part, scene, asked.pattern, asked.kind, asked.text, asked.answer))
        for seed in range(PAIRS_PER_PATTERN):
            for pattern in PATTERNS:
                pair = minimal_pair(pattern, "test", seed)
                for side in (0, 1):
                    name, group = f"pairs-{pattern}-{seed}-{side}", f"{pattern}-{seed}"
                    args = (pair.scenes[side], pattern, f"pair {pattern}", pair.question, pair.answers[side])
                    samples.append(sample(name, "pairs", *args, pair=group))
        answers = defaultdict(set)
        for asked in samples:
            answers[asked.info["kind"]].add(asked.target)
        for asked in samples:
            asked.info["num_answers"] = len(answers[asked.info["kind"]])
        return samples

    def parse(self, sample: Sample, reply: str) -> str | None:
        return reply.strip().rstrip(".").lower() or None

    def units(self, records):
        """Accuracy in percent of each question, and of each minimal pair (both right)."""
        verdicts = defaultdict(list)
        for record in records:
            verdicts[record["part"], record["pattern"], record.get("pair", record["id"])].append(record["correct"])
        units = {}
        for (part, pattern, name), correct in verdicts.items():
            if part == "pairs" and len(correct) != 2:
                continue
            right = float(correct[0] if part != "pairs" else _both(correct))
            units[f"{part} {name}"] = {
                f"{kind} {group}": value
                for group in (part, f"{part}/{pattern}")
                for kind, value in (("right", right), ("count", 1.0))
            }
        return units

    def scores(self, means):
        groups = [key.removeprefix("count ") for key, count in means.items() if key.startswith("count ") and count > 0]
        return {
            group: 100.0 * means[f"right {group}"] / means[f"count {group}"] for group in sorted(groups, key=_order)
        }

    def chance(self, records):
        """Uniform guessing among the answers that the benchmark has for that kind of question; for pairs, twice."""
        return self.score([{**record, "correct": 1.0 / record["num_answers"]} for record in records])


def _both(verdicts) -> float:
    return float(verdicts[0]) * float(verdicts[1])


def _order(group: str) -> tuple:
    return "/" in group, ("questions", "compositions", "pairs").index(group.split("/")[0]), group


class MiniCaptions(CocoCaptions):
    """Held-out scenes to be described, each with its one caption: for captioning and leakage in small."""

    name = "mini_captions"
    hub_id = ""

    def read(self, folder: Path | None) -> list[Sample]:
        from ...scenes.language import caption
        from ...scenes.render import render
        from ...scenes.world import sample_scene

        scenes = {f"scene-{seed}": sample_scene("test", seed) for seed in range(CAPTIONS)}
        return [self.sample(name, [caption(s)], lambda s=s: render(s)) for name, s in scenes.items()]


class MiniPairs(MatchingBenchmark):
    """Each scene of a minimal pair against its own caption and the other's."""

    name = "mini_pairs"
    hub_id = ""

    def read(self, folder: Path | None) -> list[MatchingItem]:
        """Minimal pairs with a caption for each image, rendered here; `folder` is not read."""
        from ...scenes.language import PATTERNS, caption, minimal_pair
        from ...scenes.render import render

        items = []
        for pattern in PATTERNS:
            for seed in range(PAIRS_PER_PATTERN):
                scenes = minimal_pair(pattern, "test", seed).scenes
                items.append(
                    MatchingItem(
                        id=f"{pattern}-{seed}",
                        images=tuple((lambda scene=scene: render(scene)) for scene in scenes),
                        texts=tuple(caption(scene) for scene in scenes),
                        info={"pattern": pattern},
                    )
                )
        return items
