"""Matplotlib figures of attention, features and similarities.

Maps use viridis and cividis, which colour-blind readers can order. Lines use the palette of Okabe and Ito.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..atomic_files import atomic_path
from ..image_loading import pad_to_square
from .attention import HeatMap, QuestionAttention, map_onto_image
from .features import DeltaMap, PCAMap, RegisterReport
from .similarity import CKAResult, SimilarityGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
HEAT = "viridis"
LONGEST_SIDE = 512
"""Longer side, in pixels, of images in figures. It suffices for a panel and keeps an SVG small."""
PADDING_COLOUR = (122, 116, 104)
"""CLIP's mean colour."""


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure that does not need a display.

    Args:
        width: In inches, at least 4.5.
        height: In inches.
        title: Title of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Run `pip install "sdllava[eval]"`.') from error
    figure = Figure(figsize=(max(width, 4.5), height), layout="constrained")
    figure.suptitle(title, fontsize=9, wrap=True)
    return figure


def check_picture_path(path: str | os.PathLike) -> Path:
    """The path of a figure, PNG or SVG by its suffix.

    Raises:
        ValueError: It has another suffix.
    """
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"A figure cannot be written to {Path(path).name!r}. Use a .png or .svg file.")
    return Path(path)


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure to a PNG or SVG file, atomically. Equal figures give equal files.

    Raises:
        ValueError: The path has another suffix.
    """
    import matplotlib  # an optional package

    target = check_picture_path(path)
    kind = target.suffix.lower()[1:]
    with atomic_path(target) as written, matplotlib.rc_context({"svg.hashsalt": "sdllava"}):
        figure.savefig(written, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _bare(axes: "Axes") -> "Axes":
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return small


def overlay(axes: "Axes", image: Image.Image, grid: np.ndarray, low: float, high: float, title: str = "") -> Any:
    """Draw a map over its image in grey.

    Args:
        axes: The axes to draw on.
        image: Upright RGB, not padded.
        grid (`np.ndarray` of shape `(side, side)`): Over the padded square.
        low: Value of the first colour.
        high: Value of the last colour.
        title: Title of the axes.

    Returns:
        The drawn map, from which `colour_bar` draws a colour bar.
    """
    small = _small(image)
    _bare(axes).imshow(small.convert("L"), cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=8)
    return axes.imshow(map_onto_image(grid, small.size), cmap=HEAT, alpha=0.65, vmin=low, vmax=high)


def colour_bar(figure: "Figure", drawn: Any, axes: Any, unit: str) -> None:
    """Draw a colour bar with its unit next to `axes`."""
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(unit, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def heatmap_figure(heat: HeatMap, title: str = "") -> "Figure":
    """An image, and a map over it."""
    figure = new_figure(7.5, 3.6, title or f"{heat.label}: {heat.description}")
    plain, over = figure.subplots(1, 2)
    _bare(plain).imshow(_small(heat.image))
    drawn = overlay(over, heat.image, heat.grid, float(heat.grid.min()), float(heat.grid.max()))
    colour_bar(figure, drawn, [plain, over], heat.unit)
    return figure


def draw_heatmap(heat: HeatMap, path: str | os.PathLike, title: str = "") -> None:
    """Write [`heatmap_figure`] to a PNG or SVG file.

    Raises:
        ValueError: The path has another suffix.
    """
    check_picture_path(path)
    save_figure(heatmap_figure(heat, title), path)


def attention_figure(rows: Sequence[tuple[str, QuestionAttention]], title: str) -> "Figure":
    """The attention to each word of a question, one row per layer or timestep (S3, Figures 4 and 11).

    The shares of attention differ much between words, so each map is drawn relative to its mean, which is printed above
    it.

    Args:
        rows: The label and the attention of each row.
        title: Title of the figure.
    """
    words = [i for i, word in enumerate(rows[0][1].words) if not word.special]
    width, height = rows[0][1].image.size
    panel = 1.5 * min(2.0, max(0.6, width / height))
    figure = new_figure(panel * (len(words) + 1) + 1.2, 1.75 * len(rows) + 0.6, title)
    axes = figure.subplots(len(rows), len(words) + 1, squeeze=False)
    for line, (label, attention) in zip(axes, rows, strict=True):
        _bare(line[0]).imshow(_small(attention.image))
        line[0].set_ylabel(label, fontsize=7)
        means = attention.maps.mean(axis=(1, 2), keepdims=True)
        relative = (attention.maps / np.maximum(means, np.finfo(np.float32).tiny))[words]
        for axis, i, grid in zip(line[1:], words, relative, strict=True):
            label = f"{attention.words[i].text}\n{means[i].item():.1%}"
            drawn = overlay(axis, attention.image, grid, float(relative.min()), float(relative.max()), label)
        colour_bar(figure, drawn, line.tolist(), "share of attention\nrelative to its mean (above)")
    return figure


def _label(tap: str, timestep: int, scale: float | None) -> str:
    return f"{tap}\nt = {timestep}" + ("" if scale is None else f", s = {scale:g}")


def pca_figure(
    images: Sequence[Image.Image], maps: Sequence[PCAMap], title: str, registers: Sequence[RegisterReport] = ()
) -> "Figure":
    """Feature maps as colours, one row per map and one column per image (S3, Figure 2).

    Args:
        images: Upright RGB. They are drawn padded to squares, as the model reads them.
        maps: From [`~sdllava.analysis.features.pca_maps`].
        title: Title of the figure.
        registers: Registers of the same taps, timesteps and scales, whose positions are circled.
    """
    circled = {(r.tap, r.timestep, r.guidance_scale): r.outlying for r in registers}
    figure = new_figure(1.7 * len(images) + 1.2, 1.75 * (len(maps) + 1) + 0.6, title)
    axes = figure.subplots(len(maps) + 1, len(images), squeeze=False)
    for axis, image in zip(axes[0], images, strict=True):
        _bare(axis).imshow(_small(pad_to_square(image, PADDING_COLOUR)))
    for line, pca_map in zip(axes[1:], maps, strict=True):
        variance = " ".join(f"{share:.0%}" for share in pca_map.pca.explained_variance_ratio)
        label = _label(pca_map.tap, pca_map.timestep, pca_map.guidance_scale)
        line[0].set_ylabel(f"{label}\nvariance {variance}", fontsize=6.5)
        found = circled.get((pca_map.tap, pca_map.timestep, pca_map.guidance_scale or 0.0))
        for i, axis in enumerate(line):
            _bare(axis).imshow(pca_map.colours[i], interpolation="nearest")
            if found is not None:
                rows, columns = np.nonzero(found[i])
                axis.scatter(columns, rows, s=40, facecolors="none", edgecolors="white", linewidths=1)
    figure.supxlabel("red, green, blue: principal components 1, 2, 3 (1st to 99th percentile)", fontsize=7)
    return figure


def delta_figure(
    images: Sequence[Image.Image], questions: Sequence[str], deltas: Sequence[DeltaMap], title: str
) -> "Figure":
    """The effect of each question: |X_c - X_u| over its image, and the PCA of X_c - X_u (S3, Figures 5, 7 and 12).

    Args:
        images: Upright RGB, one per column.
        questions: One per column.
        deltas: From [`~sdllava.analysis.features.delta_maps`], with images in the order of the columns.
        title: Title of the figure.
    """
    figure = new_figure(1.9 * len(images) + 2.2, 1.9 * (2 * len(deltas) + 1) + 0.6, title)
    axes = figure.subplots(2 * len(deltas) + 1, len(images), squeeze=False)
    for axis, image, question in zip(axes[0], images, questions, strict=True):
        _bare(axis).imshow(_small(image))
        axis.set_title(question, fontsize=7, wrap=True)
    for i, delta in enumerate(deltas):
        heat, colours = axes[2 * i + 1], axes[2 * i + 2]
        heat[0].set_ylabel(f"{_label(delta.tap, delta.timestep, None)}\n|X_c - X_u|", fontsize=6.5)
        colours[0].set_ylabel("PCA of X_c - X_u", fontsize=6.5)
        low, high = float(delta.heat.min()), float(delta.heat.max())
        pca = delta.pca()
        for j, image in enumerate(images):
            drawn = overlay(heat[j], image, delta.heat[j], low, high)
            _bare(colours[j]).imshow(pca.colours[j], interpolation="nearest")
        colour_bar(figure, drawn, heat.tolist(), "relative to the mean |X_u|")
    return figure


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
    panels = len(grid.guidance_scales)
    rows = [*grid.taps, *references]
    figure = new_figure((0.7 * len(grid.timesteps) + 1) * panels + 3, 0.32 * len(rows) + 1.6, title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    others = np.repeat(np.array(list(references.values()))[:, None], len(grid.timesteps), axis=1)
    low = float(np.floor(10 * min(0.9, grid.positions.min(), *references.values())) / 10)
    for i, axis in enumerate(axes):
        values = np.concatenate([grid.positions[:, :, i], others.reshape(-1, len(grid.timesteps))])
        drawn = _matrix(axis, values, rows if i == 0 else [""] * len(rows), [str(t) for t in grid.timesteps], low)
        axis.set_title(f"s = {grid.guidance_scales[i]:g}", fontsize=8)
        axis.set_xlabel("timestep", fontsize=7)
    colour_bar(figure, drawn, axes.tolist(), "mean cosine similarity of a pair")
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
    side = 0.45 * len(taps) + 1.2
    figure = new_figure(side * len(settings) + 3 + 3.5 * bool(guided), side + 1.3, title)
    widths = [1.0] * len(settings) + [1.2] * bool(guided)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    low = min(0.0, float(np.nanmin(result.matrix)))
    for i, (timestep, scale) in enumerate(settings):
        axis = axes[i]
        names, matrix = result.between_taps(timestep, scale)
        drawn = _matrix(axis, matrix, names if i == 0 else [""] * len(names), names, low)
        axis.set_title(f"t = {timestep}, s = {scale:g}", fontsize=8)
    colour_bar(figure, drawn, axes[: len(settings)].tolist(), "linear CKA")
    if guided:
        _scale_lines(axes[-1], result, taps, list(dict.fromkeys(t for t, _ in guided)))
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
