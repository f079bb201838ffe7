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
LABEL_SIZE = 0.14
"""Height of a label, in inches. Where rows or columns are smaller, only some of them have a label."""
NUMBER_WIDTH = 0.27
"""Width of a number in a matrix, in inches. Cells that are smaller have none."""
MOST_LINES = 12
"""Lines in one pair of axes that readers can distinguish."""


def _matrix(
    axes: "Axes",
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    cell: tuple[float, float],
) -> Any:
    """Values in [low, 1]. `cell` has the width and height of a cell in inches."""
    drawn = axes.imshow(values, cmap="cividis", vmin=low, vmax=1, aspect="auto")
    every, every_row = (max(1, ceil(LABEL_SIZE / size)) for size in cell)
    labels = columns[::every], rows[::every_row]
    style: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(columns), every), labels[0], fontsize=7, **style)
    axes.set_yticks(range(0, len(rows), every_row), labels[1], fontsize=7)
    if cell[0] < NUMBER_WIDTH or cell[1] < LABEL_SIZE:
        return drawn
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
        cell = cells / (len(grid.timesteps) * panels), ROW_HEIGHT
        drawn = _matrix(axis, values[shown], names[shown], [str(t) for t in grid.timesteps], low, cell)
        axis.set_title(f"s = {grid.guidance_scales[i]:g}", fontsize=8)
        axis.set_xlabel("timestep", fontsize=7)
    colour_bar(figure, drawn, axes.tolist(), "mean cosine similarity of a pair")
    return figure


def _similarity_bars(grid: SimilarityGrid, references: dict[str, float], title: str) -> "Figure":
    values = {**dict(zip(grid.taps, grid.positions[:, 0, 0].tolist(), strict=True)), **references}
    names, colours = list(values), [COLOURS[0]] * len(grid.taps) + [COLOURS[1]] * len(references)
    parts = ceil(len(names) / MOST_ROWS)
    part = ceil(len(names) / parts)
    figure = new_figure(min(6.5 * parts, PAGE[0]), ROW_HEIGHT * part + 1.4, title)
    for number, axes in enumerate(figure.subplots(1, parts, squeeze=False)[0]):
        shown = slice(number * part, (number + 1) * part)
        heights = [values[name] for name in names[shown]]
        drawn = axes.barh(range(len(heights)), heights, color=colours[shown])
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
        axes.set_yticks(range(len(heights)), names[shown], fontsize=7)
        axes.set(xlim=(min(0.0, *values.values()), 1.12), ylim=(part - 0.5, -0.5))
        axes.tick_params(axis="x", labelsize=7)
    figure.supxlabel(
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
    width, height = PAGE[0] - 1, PAGE[1] - 1
    wanted = min(0.45 * len(taps) + 1.2, width / 2)
    columns = min(count, int(width / wanted))
    while ceil(count / columns) * min(wanted, width / columns) > height:
        columns += 1
    side, rows = min(wanted, width / columns), ceil(count / columns)
    figure = new_figure(side * columns + 2, side * rows + 1.3, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    low = min(0.0, float(np.nanmin(result.matrix)))
    inner = max(side - 1.2, side / 2)
    cell = inner / len(taps), inner / len(taps)
    for i, (timestep, scale) in enumerate(settings):
        names, matrix = result.between_taps(timestep, scale)
        drawn = _matrix(axes[i], matrix, names if i % columns == 0 else [""] * len(names), names, low, cell)
        axes[i].set_title(f"t = {timestep}, s = {scale:g}", fontsize=8)
    colour_bar(figure, drawn, axes[: len(settings)], "linear CKA")
    if guided:
        timesteps = list(dict.fromkeys(t for t, _ in guided))
        if len(taps) * len(timesteps) <= MOST_LINES:
            _scale_lines(axes[len(settings)], result, taps, timesteps)
        else:
            _scale_matrix(axes[len(settings)], result, taps, timesteps, low, inner)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure


def _scale_matrix(
    axes: "Axes", result: CKAResult, taps: Sequence[str], timesteps: Sequence[int], low: float, inner: float
) -> None:
    """What `_scale_lines` draws, as a matrix of `inner` inches."""
    columns, values = [], []
    for timestep in timesteps:
        scales = result.with_unconditional(taps[0], timestep)[0]
        columns += [f"s = {scale:g}" if len(timesteps) == 1 else f"t = {timestep}, s = {scale:g}" for scale in scales]
        values.append(np.stack([result.with_unconditional(tap, timestep)[1] for tap in taps]))
    cell = inner / len(columns), inner / len(taps)
    _matrix(axes, np.concatenate(values, axis=1), taps, columns, low, cell)
    axes.set_title("with s = 0", fontsize=8)


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
