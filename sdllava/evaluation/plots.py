"""Plots of scores by BLINK task (S3 Figure 3) and by MMVP-VLM pattern (S4 Figure 1), and of leakage."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .benchmarks.groups import group_counts
from .bootstrap import wilson
from .compare import Comparison, Run
from .published import PublishedRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LEAST_SAMPLES = 10
"""The title has a warning where there are fewer samples."""
PAPER_ROWS = {
    "blink": ("S4 Table 8", ("CLIP-LLaVA-v1.5-7B", "SDXL-LLaVA; no-caption PT")),
    "mmvp_vlm": ("S3 Table 1", ("OpenAI ViT-L-14, 336", "SD-v2.1-base, five timesteps")),
}


def pyplot() -> ModuleType:
    """Matplotlib's pyplot with the file backend.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('Matplotlib is not installed. Run `pip install "sdllava[eval]"`.') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: "Figure", path: str | Path) -> None:
    """Save a figure as PNG, SVG or PDF, by the suffix of the file, and close it.

    Raises:
        ValueError: The suffix is another one.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Unknown picture format {path.name!r}. Use the suffix .png, .svg or .pdf.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)


def plot_parts(comparison: Comparison, path: str | Path) -> None:
    """Plot grouped bars by task or pattern, sorted by the first run, with the papers' rows and chance.

    Bars of this package's runs have 95% Wilson intervals, and their label has the number of samples.

    Raises:
        ValueError: The benchmark has no tasks or patterns, or the suffix of the file is unknown.
    """
    parts = comparison.parts
    if not parts:
        raise ValueError(
            f"{comparison.benchmark!r} has no tasks or patterns to plot. Choose results of blink, mmvp_vlm or mini."
        )
    first = comparison.runs[0].results["scores"]
    parts = sorted(parts, key=lambda part: -first[part])
    counts = part_counts(comparison.runs[0])
    bars = len(comparison.runs) + len(_paper_rows(comparison))
    height = max(2.5, len(parts) * (0.12 + 0.15 * bars)) + 1.5
    figure, axes = pyplot().subplots(figsize=(8, height), layout="constrained")
    _draw_bars(axes, comparison, parts)
    _mark_chance(axes, comparison, parts)
    labels = [f"{part.replace('_', ' ')}, n = {counts[part]}" if part in counts else part for part in parts]
    axes.set_yticks(range(len(parts)), labels, fontsize=8)
    axes.set(xlabel="score (%)", xlim=(0, 100), ylim=(len(parts) - 0.5, -0.5))
    title = f"{comparison.benchmark}: by {'task' if comparison.benchmark == 'blink' else 'pattern'}, 95% intervals"
    few = [part for part in parts if counts.get(part, LEAST_SAMPLES) < LEAST_SAMPLES]
    if few:
        title += f"\n{len(few)} of {len(parts)} have fewer than {LEAST_SAMPLES} samples and say little"
    axes.set_title(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)


def _counted(title: str, samples: Sequence[int]) -> str:
    """A title with the number of samples of each run, and a warning where they are few."""
    least, most = min(samples), max(samples)
    title += f", {least} samples" if least == most else f", {least} to {most} samples"
    return title if least >= LEAST_SAMPLES else f"{title}\nFewer than {LEAST_SAMPLES} samples say little"


def part_counts(run: Run) -> dict[str, int]:
    """The number of samples (or pairs) of each task or pattern of a run."""
    return group_counts(run.scorer().units(run.records).values())


def _draw_bars(axes: "Axes", comparison: Comparison, parts: Sequence[str]) -> None:
    papers = _paper_rows(comparison)
    height = 0.8 / (len(comparison.runs) + len(papers))
    for number, run in enumerate(comparison.runs):
        scores = [run.results["scores"].get(part, 0.0) for part in parts]
        counts, intervals = part_counts(run), run.results.get("intervals_95", {})
        spans = [
            wilson(score, counts[part]) if part in counts else intervals.get(part, (score, score))
            for part, score in zip(parts, scores, strict=True)
        ]
        errors = [
            [max(0.0, score - low) for score, (low, _) in zip(scores, spans, strict=True)],
            [max(0.0, high - score) for score, (_, high) in zip(scores, spans, strict=True)],
        ]
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "xerr": errors,
            "ecolor": "#555555",
            "capsize": 2,
        }
        axes.barh(_positions(number, height, len(parts)), scores, height, label=run.label, **style)
    for number, row in enumerate(papers, len(comparison.runs)):
        scores = [row.scores.get(part, 0.0) for part in parts]
        style = {"color": "white", "edgecolor": "#555555", "hatch": ("//", "..")[number % 2]}
        axes.barh(_positions(number, height, len(parts)), scores, height, label=f"{row.model} ({row.source})", **style)


def _positions(number: int, width: float, count: int) -> list[float]:
    return [x + (number + 0.5) * width - 0.4 for x in range(count)]


def _paper_rows(comparison: Comparison) -> list[PublishedRow]:
    source, models = PAPER_ROWS.get(comparison.benchmark, ("", ()))
    return [row for row in comparison.published if row.source == source and row.model in models]


def _mark_chance(axes: "Axes", comparison: Comparison, parts: Sequence[str]) -> None:
    chance = comparison.runs[0].results.get("chance", {})
    for x, part in enumerate(parts):
        level = chance.get(part, chance.get("average"))
        if level is not None:
            axes.vlines(
                level, x - 0.42, x + 0.42, colors="black", linestyles="dotted", label="chance" if x == 0 else ""
            )


def plot_timesteps(comparison: Comparison, path: str | Path) -> None:
    """Draw the headline score as a heat map: a row per tap and a column per timestep, with intervals (S3, Figure 3).

    Runs without a diffusion model have no place in it. Of several runs with the same tap and timestep, the last counts.

    Raises:
        ValueError: No run has taps and timesteps, or the suffix of the file is unknown.
    """
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for run in comparison.runs:
        if tower := run.results.get("tower"):
            key = " + ".join(tower["taps"]), " + ".join(map(str, tower["timesteps"]))
            cells[key] = run.results
    if not cells:
        raise ValueError(
            "None of these results has a diffusion model's taps and timesteps. Evaluate the models again with this "
            "version, or leave out --heatmap."
        )
    taps = list(dict.fromkeys(tap for tap, _ in cells))
    timesteps = sorted({timestep for _, timestep in cells}, key=lambda name: [int(t) for t in name.split(" + ")])
    metric = comparison.metric
    values = [[cells.get((tap, t), {}).get("scores", {}).get(metric, float("nan")) for t in timesteps] for tap in taps]
    figure, axes = pyplot().subplots(figsize=(1.3 * len(timesteps) + 3, 0.6 * len(taps) + 1.6), layout="constrained")
    drawn = axes.imshow(values, cmap="cividis", aspect="auto")
    for (tap, timestep), results in cells.items():
        row, column, score = taps.index(tap), timesteps.index(timestep), results["scores"].get(metric)
        if score is not None:
            low, high = results["intervals_95"][metric]
            colour = "white" if drawn.norm(score) < 0.6 else "black"
            text = f"{score:.1f}\n[{low:.1f}, {high:.1f}]"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(timesteps)), timesteps)
    axes.set_yticks(range(len(taps)), taps, fontsize=8)
    samples = [results["samples"] for results in cells.values()]
    axes.set_title(_counted(f"{comparison.benchmark}: {metric}, 95% intervals", samples), fontsize=9)
    axes.set_xlabel("timestep")
    figure.colorbar(drawn, ax=axes)
    save(figure, path)


def plot_leakage(result: dict[str, Any], path: str | Path) -> None:
    """Plot task score, leakage by captions and leakage by likelihood over the guidance scale, one line per model.

    Raises:
        ValueError: The suffix of the file is unknown.
    """
    plt = pyplot()
    metric = result["metric"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), sharex=True, layout="constrained")
    for number, label in enumerate(result["smallest_leaking_scale"]):
        rows = [row for row in result["rows"] if row["model"] == label]
        colour, scales = COLOURS[number % len(COLOURS)], [row["scale"] for row in rows]
        left.plot(scales, [row["task"][metric] for row in rows], "o-", color=colour, label=f"{label}: task")
        left.plot(
            scales, [row["mismatched"][metric] for row in rows], "s--", color=colour, label=f"{label}: wrong prompt"
        )
        left.plot(scales, [row["control"][metric] for row in rows], ":", color=colour, label=f"{label}: control")
        gains = [row["likelihood_gain"] for row in rows]
        right.plot(scales, [gain["mean"] for gain in gains], "o-", color=colour, label=label)
        low, high = ([gain["interval"][end] for gain in gains] for end in (0, 1))
        right.fill_between(scales, low, high, color=colour, alpha=0.2)
    figure.suptitle(_counted("Leakage of the prompt", [result["samples"]]), fontsize=10)
    right.axhline(0, color="black", linewidth=0.8, linestyle="dotted")
    left.set(xlabel="guidance scale s", ylabel=metric, title="Task score, and score against the wrong prompt")
    right.set(xlabel="guidance scale s", ylabel="nats per token", title="Likelihood gain of the wrong prompt's text")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save(figure, path)
