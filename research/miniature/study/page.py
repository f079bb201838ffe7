"""The study's page: tables, pictures and verdicts, all from the parts' numbers and nothing else."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdllava.evaluation.results import write_text
from sdllava.scenes.dataset import PATTERNS

from ..judge import ATTRIBUTES
from .claims import HOLDS, REVERSED, UNDECIDED, UNMEASURED, sentence, verdict
from .guidance import GUESS
from .pictures import draw
from .scales import STUDY_SCALES
from .similarity import GUIDANCE
from .taps import DEFAULT_TAP, DEFAULT_TIMESTEP, TAPS, TIMESTEPS

NUMBER = dict[str, Any]

TITLES = {
    "a": "(a) Taps and timesteps (S3, Figure 3)",
    "b": "(b) Matching of minimal pairs (S3, Tables 1 and 6)",
    "c": "(c) Questions, with CLIP and diffusion features (S3, Table 2)",
    "d": "(d) Captions, guidance and leakage (S3, Figure 6 and Table 5)",
    "e": "(e) Guidance ensembles (S3, section 6)",
    "f": "(f) Similarity and CKA (S3, Figures 2c, 5c and 9)",
}
HEAD = """# The papers in small

The papers' tables on the miniature's own parts: a VAE, UNet, CLIP and Llama trained on rendered scenes of one to four
objects. S3 is arXiv 2507.07106. Nothing here says anything about photographs or large models; it says which of the
papers' effects appear in a system of the same build that anyone can train. This page is written by

```bash
sdllava mini study --from FOLDER --out docs{scale}
```

from the numbers in `FOLDER/study`, where FOLDER is what `sdllava mini train` left. Brackets hold 95% bootstrap
intervals over held-out scenes, questions or pairs. Each verdict is computed: a trend *holds* where the whole interval
of the paired difference lies above zero, *does not hold* where it lies below, and is *undecided* otherwise. (b) has
{trials} noise draws; (a), (e) and (f) are read under one noise map, and their differences under two more. In (c) and
(d), which are costly, every model is trained from one seed: their intervals do not hold what another training would
have changed.
"""
SMOKE = "**These are the numbers of a smoke test, with parts that have learnt nothing: they are no result.**\n"


def number(value: float | None, digits: int = 1) -> str:
    """A number, or n/a where nothing could be measured."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def cell(value: float | None, interval: Sequence[float | None] | None = None, digits: int = 1) -> str:
    """A number with its interval."""
    if interval is None or None in interval:
        return number(value, digits)
    return f"{number(value, digits)} [{number(interval[0], digits)}, {number(interval[1], digits)}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _taps(found: NUMBER) -> list[str]:
    budget = found["settings"]["budgets"]["readout"]
    by_place = {(row["tap"], row["timestep"]): row for row in found["rows"]}

    def score(place, name="mean"):
        row = by_place[place]
        return cell(row["scores"].get(name), row["intervals"].get(name))

    rows = [[tap, *(score((tap, t)) for t in TIMESTEPS)] for tap in TAPS]
    rows += [[name, score((name, None)), *[""] * (len(TIMESTEPS) - 1)] for name in ("CLIP", "most frequent value")]
    shown = {f"{DEFAULT_TAP}, t = {DEFAULT_TIMESTEP}": (DEFAULT_TAP, DEFAULT_TIMESTEP)}
    shown |= {name: (name, None) for name in ("CLIP", "most frequent value")}
    details = [[label, *(score(place, name) for name in ATTRIBUTES)] for label, place in shown.items()]
    return [
        f"Ridge regression reads the attributes of each quadrant off its 4x4 unasked features, learnt from {budget[0]} "
        f"scenes and tested on {budget[1]} held-out ones; one noise map. Percent right, mean of six attributes:",
        table(["tap", *(f"t = {t}" for t in TIMESTEPS)], rows),
        "By attribute:",
        table(["features", *ATTRIBUTES], details),
    ]


def _matching(found: NUMBER) -> list[str]:
    rows = found["rows"]
    unet, clip = rows["UNet"], rows["CLIP"]
    lines = []
    for name in unet["scores"]:
        spread = unet["spread"] and f" ± {number(unet['spread'][name])}"
        lines.append(
            [
                name,
                f"{number(unet['scores'][name])}{spread or ''} "
                f"[{', '.join(number(bound) for bound in unet['intervals_95'][name])}]",
                cell(clip["scores"][name], clip["intervals_95"][name]),
            ]
        )
    by_timestep = [[title, number(entry["mean"]["average"])] for title, entry in unet["timesteps"].items()]
    return [
        f"{unet['samples']} minimal pairs, each scene against its own caption and the other's, through `sdllava match`;"
        f" {unet['trials']} noise draws (± is their spread). Percent of pairs in which both captions pick their scene; "
        "chance is 25, and below it one scene of a pair mostly wins with both captions:",
        table(["pattern", "UNet, cross-attention", "CLIP"], lines),
        "The UNet's average at single timesteps:",
        table(["timestep", "average"], by_timestep),
    ]


def _taps_read(found: NUMBER) -> str:
    return " and ".join(found["settings"]["tower"]["taps"])


def _questions(found: NUMBER) -> list[str]:
    rows, budgets = found["rows"], found["settings"]["budgets"]
    parts = ("questions", "compositions", "pairs")
    overview = []
    for name, row in rows.items():
        own, blind = row["prompts"]["own question"], row["blind"]["scores"]
        cells = [cell(own["scores"].get(part), own["intervals_95"].get(part)) for part in parts]
        overview.append([name, *cells, *(number(blind.get(part)) for part in ("questions", "pairs"))])
    prompts = [
        [name, prompt, *(cell(result["scores"].get(part), result["intervals_95"].get(part)) for part in parts)]
        for name, row in rows.items()
        if len(row["prompts"]) > 1
        for prompt, result in row["prompts"].items()
    ]

    def pattern(row, name):
        own, blind = row["prompts"]["own question"]["scores"], row["blind"]["scores"]
        asked, pairs = f"questions/{name}", f"pairs/{name}"
        return f"{number(own.get(asked))} ({number(blind.get(asked))}) / {number(own.get(pairs))}"

    align, finetune = budgets["align"], budgets["finetune"]
    return [
        f"Every variant is trained alike, one seed: stage 1 on {align['scenes']} captions, {align['epochs']} times; "
        f"stage 2 on {finetune['scenes']} scenes with up to {finetune['turns']} questions, {finetune['epochs']} times "
        f"(the diffusion model, read at {_taps_read(found)}, is asked the last). `sdllava evaluate "
        f"--benchmark mini` on {next(iter(rows.values()))['prompts']['own question']['samples']} samples; blind is the "
        "same model with grey images. Percent right; both of a pair must be:",
        table(["variant", *parts, "questions, blind", "pairs, blind"], overview),
        "With another prompt for the diffusion model in place of the question:",
        table(["variant", "diffusion prompt", *parts], prompts),
        "By pattern, questions (blind) / pairs:",
        table(["pattern", *rows], [[name, *(pattern(row, name) for row in rows.values())] for name in PATTERNS]),
    ]


def _captions(found: NUMBER) -> list[str]:
    rows, budgets = found["rows"], found["settings"]["budgets"]
    metric = next(iter(rows.values()))["runs"]["no caption"]["metric"]
    prompts = ("its caption", "no caption", "a wrong caption")

    def score(row, prompt):
        run = row["runs"].get(prompt)
        return "" if run is None else cell(run["scores"].get(metric), run["intervals_95"].get(metric))

    def leak(row, key, value):
        entry = row.get("leakage", {}).get(key)
        return "" if entry is None else cell(entry[value], entry["interval"], 3)

    lines = [
        [
            name,
            *(score(row, prompt) for prompt in prompts),
            leak(row, "excess", "difference"),
            leak(row, "likelihood_gain", "mean"),
        ]
        for name, row in rows.items()
    ]
    scales = [name for name in found["read_out"] if not name.endswith("dropout")]
    read = [
        [name, *(cell(found["read_out"][key]["AUC"], found["read_out"][key]["interval"], 3) for key in keys)]
        for name, keys in ((name, (name, f"{name}, dropout")) for name in scales)
    ]
    captions, leakage = budgets["captions"], budgets["leakage"]
    return [
        f"The projector alone is trained, on {captions['scenes']} captions, {captions['epochs']} times, one seed; the "
        f"diffusion model, read at {_taps_read(found)}, is told the caption at scale s, dropped for 30% with dropout. "
        f"{metric} on held-out scenes, "
        "told their caption, nothing, or another scene's (scored against that wrong caption); the excess is over what "
        "the model says without a caption, the gain is in nats a token of the wrong caption:",
        table(["training", *(f"told {prompt}" for prompt in prompts), "excess", "likelihood gain"], lines),
        f"A linear read-out of a scene's colours, learnt from the features of {leakage[0]} scenes told their caption, "
        f"is shown {leakage[1]} scenes told a wrong one. AUC for the wrong caption's colours among those not in the "
        "picture (0.5 where nothing leaks):",
        table(["guidance", "trained on captions", "30% dropped"], read),
    ]


def _guidance(found: NUMBER) -> list[str]:
    budget = found["settings"]["budgets"]["asked"]
    patterns = [name for name in PATTERNS if name in found["rows"][GUESS]["scores"]]
    lines = [
        [name, cell(row["scores"]["mean"], row["intervals"]["mean"]), *(number(row["scores"][p]) for p in patterns)]
        for name, row in found["rows"].items()
    ]
    return [
        f"One linear read-out answers all questions from the features at {DEFAULT_TAP}, t = {DEFAULT_TIMESTEP}, "
        f"averaged over quadrants; it is not told the question, the diffusion model is. {budget[0]} questions to "
        f"learn, {budget[1]} held-out ones to test, one noise map. Percent right. As guidance is linear, the mean over "
        "s = 0, 1, 4 is s = 5/3, and three scales side by side hold no more than two:",
        table(["features", "mean", *patterns], lines),
    ]


def _similarity(found: NUMBER) -> list[str]:
    budgets = found["settings"]["budgets"]
    alike, moved = found["similarity"], found["cka"]
    rows = [[tap, *(cell(*_pair(alike[f"{tap}|{t}"]), 3) for t in TIMESTEPS)] for tap in TAPS]
    rows.append(["CLIP", cell(*_pair(alike["CLIP"]), 3), *[""] * (len(TIMESTEPS) - 1)])
    scales = [s for s in GUIDANCE if s]
    moves = [[tap, *(cell(*_pair(moved[f"{tap}|{s:g}"]), 3) for s in scales)] for tap in TAPS]
    return [
        f"Mean cosine similarity of the two scenes of {found['num_pairs']} minimal pairs, position by position, one "
        "noise map:",
        table(["tap", *(f"t = {t}" for t in TIMESTEPS)], rows),
        f"Linear CKA of features asked with the scene's caption with unasked ones, t = {DEFAULT_TIMESTEP}; "
        f"{budgets['groups']} disjoint groups of {budgets['group_size']} scenes, intervals over groups:",
        table(["tap", *(f"s = {s:g}" for s in scales)], moves),
    ]


def _pair(entry: NUMBER) -> tuple:
    return entry["mean"], entry["interval"]


SECTIONS = {
    "a": _taps,
    "b": _matching,
    "c": _questions,
    "d": _captions,
    "e": _guidance,
    "f": _similarity,
}


def _overview(found: dict[str, NUMBER]) -> str:
    kinds = (HOLDS, REVERSED, UNDECIDED, UNMEASURED)
    rows = []
    for part, numbers in found.items():
        counts = Counter(verdict(claim["interval"]) for claim in numbers["claims"])
        rows.append([TITLES[part], *(str(counts[kind]) for kind in kinds), f"{numbers['cpu_seconds'] / 60:.0f}"])
    return table(["part", "trends that hold", "that do not", "undecided", "not measurable", "CPU minutes"], rows)


def _trials(found: dict[str, NUMBER]) -> str:
    count = found["b"]["rows"]["UNet"]["trials"] if "b" in found else STUDY_SCALES["mini"].match_trials
    return {1: "one", 2: "two", 3: "three"}.get(count, str(count))


def _reached(found: dict[str, NUMBER]) -> list[str]:
    """What the miniature's parts had learnt when they were measured."""
    checks = {part: told for numbers in found.values() for part, told in numbers["checks"].items()}
    rows = [[part, ", ".join(f"{name} {value:.3g}" for name, value in told.items())] for part, told in checks.items()]
    return ["On held-out scenes the parts had reached:", table(["part", "check"], rows)] if rows else []


def _wrapped(block: str) -> str:
    """Paragraphs of one line in lines of at most 120 characters."""
    return block if "\n" in block or block.startswith(("!", "-")) else textwrap.fill(block, 120)


def _unmeasured(found: dict[str, NUMBER]) -> list[str]:
    missing = [title for part, title in TITLES.items() if part not in found]
    return [f"Not measured yet: {'; '.join(missing)}."] if missing else []


def page(found: dict[str, NUMBER], pictures: dict[str, str]) -> str:
    """The page as Markdown.

    Args:
        found: each part's numbers.
        pictures: each part's picture, relative to the page.
    """
    scales = {numbers["settings"]["scale"] for numbers in found.values()}
    scale = "" if scales == {"mini"} else f" --scale {min(scales)}" if len(scales) == 1 else ""
    blocks = [
        HEAD.format(scale=scale, trials=_trials(found)),
        *([SMOKE] if "smoke" in scales else []),
        *_reached(found),
        _overview(found),
        *_unmeasured(found),
    ]
    for part, numbers in found.items():
        blocks += [f"## {TITLES[part]}", *SECTIONS[part](numbers)]
        if part in pictures:
            blocks.append(f"![{TITLES[part]}]({pictures[part]})")
        blocks.append("\n".join(f"- {sentence(claim)}" for claim in numbers["claims"]))
    return "\n\n".join(_wrapped(block.strip("\n")) for block in blocks) + "\n"


def write_page(found: dict[str, NUMBER], out: Path) -> Path:
    """Draws the pictures into `out/miniature`, writes `out/miniature.md`, and returns its path."""
    pictures = draw(found, out / "miniature")
    target = out / "miniature.md"
    write_text(target, page(found, {part: f"miniature/{name}" for part, name in pictures.items()}))
    return target
