"""The study's pictures, one per part, drawn from the parts' numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdllava.analysis.plots import COLOURS, new_figure, save_figure

from .captions import EMPTY, RUNS
from .similarity import GUIDANCE
from .taps import TAPS, TIMESTEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAN = float("nan")
MARKERS = "os^Dv<>"
Point = tuple[float | None, Any]
"""A mean and its interval, or None."""


def _number(value: float | None) -> float:
    return NAN if value is None else value


def _lines(axes: "Axes", positions: Sequence[float], lines: Mapping[str, Sequence[Point]]) -> None:
    """Draw lines with their intervals."""
    for k, (name, points) in enumerate(lines.items()):
        means = [_number(mean) for mean, _ in points]
        bars = _errors(means, [interval for _, interval in points])
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        axes.errorbar(
            positions, means, bars, label=name, color=colour, marker=marker, markersize=3, linewidth=1, capsize=2
        )


def _errors(means: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]]:
    bounds = [[_number(bound) for bound in interval or (NAN, NAN)] for interval in intervals]
    below = [max(0.0, mean - low) for mean, (low, _) in zip(means, bounds, strict=True)]
    return [below, [max(0.0, high - mean) for mean, (_, high) in zip(means, bounds, strict=True)]]


def _bars(axes: "Axes", groups: Sequence[str], series: Mapping[str, Sequence[Point]]) -> None:
    """Draw grouped bars with their intervals."""
    width = 0.8 / len(series)
    for k, (name, points) in enumerate(series.items()):
        means = [_number(mean) for mean, _ in points]
        at = [group + (k - (len(series) - 1) / 2) * width for group in range(len(groups))]
        errors = _errors(means, [interval for _, interval in points])
        colour = COLOURS[k % len(COLOURS)]
        axes.bar(at, means, width, yerr=errors, label=name, color=colour, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups, fontsize=7, rotation=25, ha="right", rotation_mode="anchor")
    axes.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False)


def _taps(found: dict) -> "Figure":
    figure = new_figure(7, 4, "Accuracy of linear read-outs of a scene's attributes")
    axes = figure.subplots()
    by_place = {
        (row["tap"], row["timestep"]): (row["scores"]["mean"], row["intervals"]["mean"]) for row in found["rows"]
    }
    _lines(axes, range(len(TIMESTEPS)), {tap: [by_place[tap, t] for t in TIMESTEPS] for tap in TAPS})
    for name, style in (("CLIP", "--"), ("most frequent value", ":")):
        axes.axhline(by_place[name, None][0], color="black", linestyle=style, linewidth=1, label=name)
    axes.set_xticks(range(len(TIMESTEPS)), [str(t) for t in TIMESTEPS])
    axes.set_xlabel("timestep")
    axes.set_ylabel("correct attributes, %")
    axes.legend(fontsize=6)
    return figure


def _matching(found: dict) -> "Figure":
    figure = new_figure(8, 3.6, "Minimal pairs matched with their captions")
    axes = figure.subplots()
    names = list(found["rows"]["UNet"]["scores"])
    series = {
        label: [(row["scores"][name], row["intervals_95"][name]) for name in names]
        for label, row in found["rows"].items()
    }
    _bars(axes, names, series)
    axes.axhline(25, color="black", linestyle=":", linewidth=1)
    axes.set_ylabel("correct pairs, %")
    axes.set_ylim(0, 100)
    return figure


def _questions(found: dict) -> "Figure":
    figure = new_figure(8, 4, "Held-out questions and minimal pairs, with images and blind")
    axes = figure.subplots()
    rows = found["rows"]

    def points(part: str) -> list[Point]:
        runs = [row["prompts"]["own question"] for row in rows.values()]
        return [(run["scores"].get(part), run["intervals_95"].get(part)) for run in runs]

    blind = [(row["blind"]["scores"].get("questions"), None) for row in rows.values()]
    series = {part: points(part) for part in ("questions", "compositions", "pairs")}
    _bars(axes, list(rows), {**series, "questions, blind": blind})
    axes.set_ylabel("correct, %")
    axes.set_ylim(0, 100)
    return figure


def _captions(found: dict) -> "Figure":
    figure = new_figure(10, 4, "Captions under guidance, and read-outs of a wrong caption")
    left, right = figure.subplots(1, 2)
    rows = found["rows"]
    metric = next(iter(rows.values()))["runs"][EMPTY]["metric"]

    def point(row: dict, prompt: str) -> Point:
        run = row["runs"].get(prompt)
        return (None, None) if run is None else (run["scores"].get(metric), run["intervals_95"].get(metric))

    _bars(left, list(rows), {prompt: [point(row, prompt) for row in rows.values()] for prompt in RUNS})
    left.set_ylabel(metric)
    scales = [name for name in found["read_out"] if not name.endswith("dropout")]
    for label, end in (("trained on captions", ""), ("30% dropped", ", dropout")):
        entries = [found["read_out"][name + end] for name in scales]
        means = [_number(entry["AUC"]) for entry in entries]
        errors = _errors(means, [entry["interval"] for entry in entries])
        right.errorbar([float(name[4:]) for name in scales], means, yerr=errors, label=label, marker="o", capsize=2)
    right.axhline(0.5, color="black", linestyle=":", linewidth=1)
    right.set_xlabel("guidance scale s")
    right.set_ylabel("AUC of the wrong caption's colours")
    right.legend(fontsize=7)
    return figure


def _guidance(found: dict) -> "Figure":
    figure = new_figure(7, 3.6, "Accuracy of a linear read-out of the answers")
    axes = figure.subplots()
    rows = found["rows"]
    _bars(
        axes, list(rows), {"mean over patterns": [(r["scores"]["mean"], r["intervals"]["mean"]) for r in rows.values()]}
    )
    axes.set_ylabel("correct answers, %")
    axes.set_ylim(0, 100)
    return figure


def _similarity(found: dict) -> "Figure":
    figure = new_figure(10, 4, "Similarity of the scenes of a pair, and the effect of captions on features")
    left, right = figure.subplots(1, 2)

    def points(entries: dict[str, dict], keys: list[str]) -> list[Point]:
        return [(entries[key]["mean"], entries[key]["interval"]) for key in keys]

    similar, changed = found["similarity"], found["cka"]
    _lines(left, range(len(TIMESTEPS)), {tap: points(similar, [f"{tap}|{t}" for t in TIMESTEPS]) for tap in TAPS})
    left.axhline(similar["CLIP"]["mean"], color="black", linestyle="--", linewidth=1, label="CLIP")
    left.set_xticks(range(len(TIMESTEPS)), [str(t) for t in TIMESTEPS])
    left.set_xlabel("timestep")
    left.set_ylabel("cosine similarity of a pair")
    _lines(right, GUIDANCE, {tap: points(changed, [f"{tap}|{s:g}" for s in GUIDANCE]) for tap in TAPS})
    right.set_xlabel("guidance scale s")
    right.set_ylabel("linear CKA with s = 0")
    figure.legend(*left.get_legend_handles_labels(), fontsize=6, loc="outside lower center", ncols=len(TAPS) + 1)
    return figure


PICTURES = {
    "a": ("taps", _taps),
    "b": ("matching", _matching),
    "c": ("questions", _questions),
    "d": ("captions", _captions),
    "e": ("guidance", _guidance),
    "f": ("similarity", _similarity),
}


def draw(found: dict[str, dict], folder: Path) -> dict[str, str]:
    """Draw each part's picture.

    Args:
        found: The numbers of each part.
        folder: The folder of the pictures.

    Returns:
        `dict[str, str]`: The name of each part's file.
    """
    names = {}
    for part, numbers in found.items():
        if part not in PICTURES:
            continue
        name, figure_of = PICTURES[part]
        save_figure(figure_of(numbers), folder / f"{name}.png")
        names[part] = f"{name}.png"
    return names
