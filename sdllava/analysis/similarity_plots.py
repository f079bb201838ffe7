"""Matplotlib figures of similarity grids and CKA."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import COLOURS, PAGE, colour_bar, new_figure
from .similarity import CKAResult, SimilarityGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ROW_HEIGHT = 0.2
"""Height of a row of a matrix, in inches."""
MOST_ROWS = int((PAGE[1] - 1.6) / ROW_HEIGHT)
"""Rows of a matrix that fit a page. More continue next to it."""


def _matrix(axes: "Axes", values: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float) -> Any:
    """Annotated values in [low, 1]."""
    drawn = axes.imshow(values, cmap="cividis", vmin=low, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    for (i, j), value in np.ndenumerate(values):
        colour = "black" if np.isfinite(value) and value > (1 + low) / 2 else "white"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return drawn


def similarity_figure(grid: SimilarityGrid, references: dict[str, float], title: str) -> "Figure":
    """Mean cosine similarity of image pairs over taps and timesteps, one panel per guidance scale (S3, Figure 2c).

    Args:
        grid: From [`~sdllava.analysis.similarity.similarity_grid`].
        references: The similarity of the same pairs for other encoders by name, drawn as additional rows.
        title: Title of the figure.
    """
    if len(grid.timesteps) == 1 and len(grid.guidance_scales) == 1:
        return _similarity_bars(grid, references, title)
    rows = [*grid.taps, *references]
    parts = ceil(len(rows) / MOST_ROWS)
    part = ceil(len(rows) / parts)
    panels = parts * len(grid.guidance_scales)
    cells = min(0.7 * len(grid.timesteps) * panels, max(2.0, PAGE[0] - 2.2 * parts))
    figure = new_figure(cells + 2.2 * parts + 1, ROW_HEIGHT * part + 1.6, title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    others = np.repeat(np.array(list(references.values()))[:, None], len(grid.timesteps), axis=1)
    low = float(np.floor(10 * min(0.9, grid.positions.min(), *references.values())) / 10)
    for number, axis in enumerate(axes):
        start, i = number // len(grid.guidance_scales) * part, number % len(grid.guidance_scales)
        values = np.concatenate([grid.positions[:, :, i], others.reshape(-1, len(grid.timesteps))])
        names = rows if i == 0 else [""] * len(rows)
        shown = slice(start, start + part)
        drawn = _matrix(axis, values[shown], names[shown], [str(t) for t in grid.timesteps], low)
        axis.set_title(f"s = {grid.guidance_scales[i]:g}", fontsize=8)
        axis.set_xlabel("timestep", fontsize=7)
    colour_bar(figure, drawn, axes.tolist(), "mean cosine similarity of a pair")
    return figure


def _similarity_bars(grid: SimilarityGrid, references: dict[str, float], title: str) -> "Figure":
    values = {**dict(zip(grid.taps, grid.positions[:, 0, 0].tolist(), strict=True)), **references}
    figure = new_figure(6.5, 0.22 * len(values) + 1.4, title)
    axes = figure.subplots()
    colours = [COLOURS[0]] * len(grid.taps) + [COLOURS[1]] * len(references)
    drawn = axes.barh(range(len(values)), list(values.values()), color=colours)
    axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(values)), list(values), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *values.values()), 1.08)
    axes.set_xlabel(
        f"mean cosine similarity of a pair, t = {grid.timesteps[0]}, s = {grid.guidance_scales[0]:g}", fontsize=7
    )
    return figure


def cka_figure(result: CKAResult, title: str) -> "Figure":
    """CKA between taps (S3, Figure 9), and of each guidance scale with s = 0 (S3, Figure 5c).

    Args:
        result: From [`~sdllava.analysis.similarity.cka`].
        title: Title of the figure.
    """
    settings = list(dict.fromkeys(key[1:] for key in result.keys))
    taps = list(dict.fromkeys(key[0] for key in result.keys))
    guided = [(t, s) for t, s in settings if s != 0 and (taps[0], t, 0.0) in result.keys]
    count = len(settings) + bool(guided)
    side = min(0.45 * len(taps) + 1.2, PAGE[0] / 2)
    columns = max(1, min(count, int(PAGE[0] / side)))
    rows = ceil(count / columns)
    figure = new_figure(side * columns + 2, side * rows + 1.3, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    low = min(0.0, float(np.nanmin(result.matrix)))
    for i, (timestep, scale) in enumerate(settings):
        names, matrix = result.between_taps(timestep, scale)
        drawn = _matrix(axes[i], matrix, names if i % columns == 0 else [""] * len(names), names, low)
        axes[i].set_title(f"t = {timestep}, s = {scale:g}", fontsize=8)
    colour_bar(figure, drawn, axes[: len(settings)], "linear CKA")
    if guided:
        _scale_lines(axes[len(settings)], result, taps, list(dict.fromkeys(t for t, _ in guided)))
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure


def _scale_lines(axes: "Axes", result: CKAResult, taps: Sequence[str], timesteps: Sequence[int]) -> None:
    for i, tap in enumerate(taps):
        for j, timestep in enumerate(timesteps):
            scales, values = result.with_unconditional(tap, timestep)
            label = tap if len(timesteps) == 1 else f"{tap}, t = {timestep}"
            style: dict[str, Any] = {
                "linestyle": ("-", "--", ":", "-.")[j % 4],
                "marker": "os^Dv"[i // len(COLOURS) % 5],
            }
            axes.plot(scales, values, color=COLOURS[i % len(COLOURS)], markersize=3, label=label, **style)
    axes.set_xlabel("guidance scale s", fontsize=8)
    axes.set_ylabel("linear CKA with s = 0", fontsize=8)
    axes.legend(fontsize=6)
