"""Matplotlib figures of attention and features, sized to fit a page.

Maps use viridis and cividis, which colour-blind readers can order. Lines use the palette of Okabe and Ito.
"""

import os
from collections.abc import Sequence
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..atomic_files import atomic_path
from .attention import HeatMap, QuestionAttention, drawn_part, map_onto_image
from .features import DeltaMap, PCAMap, RegisterReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
HEAT = "viridis"
LONGEST_SIDE = 512
"""Longer side, in pixels, of images in figures. It suffices for a panel and keeps an SVG small."""
PAGE = (10.0, 13.0)
"""Width and height, in inches, that the panels of a figure may fill."""
LARGEST_PANEL = 1.7
SMALLEST_PANEL = 0.4
LABEL_HEIGHT = 0.45
"""Height of a panel's label, in inches."""


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
        raise ImportError('Figures need matplotlib. Run `pip install "sdllava[demo]"`.') from error
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


def few_samples(count: int, least: int, what: str) -> str:
    """A warning that a statistic has too few samples, empty where it has enough.

    Args:
        count: The number of samples.
        least: Smaller numbers get a warning.
        what: What the samples are, in the plural.
    """
    return "" if count >= least else f"Only {count} {what}: the estimate is noisy. Use at least {least}."


def layout(blocks: int, panels: int, aspect: float = 1.0) -> tuple[int, int, float]:
    """How blocks of panels are arranged to fit a page: single panels as a square, wider blocks below each other.

    Args:
        blocks: The number of blocks.
        panels: The number of panels in a block, side by side.
        aspect: The height of a panel divided by its width.

    Returns:
        `tuple[int, int, float]`: Rows and columns of blocks, and the width of a panel in inches, as large as possible.
    """

    def side(columns: int) -> float:
        rows = ceil(blocks / columns)
        fits = min(LARGEST_PANEL, PAGE[0] / (columns * panels), (PAGE[1] / rows - LABEL_HEIGHT) / aspect)
        return max(fits, SMALLEST_PANEL)

    def squareness(columns: int) -> float:
        height = ceil(blocks / columns) * (side(columns) * aspect + LABEL_HEIGHT)
        return -abs(log(max(columns * side(columns), 0.1) / max(height, 0.1)))

    columns = max(range(1, blocks + 1), key=lambda n: (round(side(n), 3), squareness(n) if panels == 1 else -n))
    return ceil(blocks / columns), columns, side(columns)


def _aspect(images: Sequence[Image.Image]) -> float:
    """The height of a panel for images, divided by its width."""
    return max(image.height / image.width for image in images)


def _blocks(blocks: int, panels: int, title: str, aspect: float) -> tuple["Figure", list[list["Axes"]]]:
    """A figure with the axes of each block; what is left over is invisible."""
    rows, columns, side = layout(blocks, panels, aspect)
    figure = new_figure(columns * panels * side + 0.3, rows * (side * aspect + LABEL_HEIGHT) + 0.6, title)
    axes = figure.subplots(rows, columns * panels, squeeze=False).reshape(rows * columns, panels)
    for number, axis in enumerate(axes.flat):
        axis.set_anchor("N")  # below its label, also where the panels of a row have different heights
        axis.set_visible(number < blocks * panels)
    return figure, [list(line) for line in axes[:blocks]]


def _label_block(axes: "Axes", label: str) -> None:
    axes.set_title(label, fontsize=6.5, loc="left")


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


def draw_colours(axes: "Axes", colours: np.ndarray, image: Image.Image) -> None:
    """Draw a map of colours with the image's aspect ratio: the padding of the square is not visible.

    Args:
        axes: The axes to draw on. Its coordinates are the image's pixels.
        colours (`np.ndarray` of shape `(side, side, 3)`): Over the padded square, in [0, 1].
        image: Upright RGB, not padded.
    """
    width, height = image.size
    left, top = _padding(image)
    place = (-left, width + left, height + top, -top)
    _bare(axes).imshow(colours, interpolation="nearest", extent=place)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _padding(image: Image.Image) -> tuple[float, float]:
    """The padding at the left and at the top of an image's square, in its pixels."""
    side = max(image.size)
    return (side - image.width) / 2, (side - image.height) / 2


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


def _range(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    return min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)


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
    low, high = _range([drawn_part(heat.grid, _small(heat.image).size)])
    drawn = overlay(over, heat.image, heat.grid, low, high)
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

    The shares differ much between words, so each map is drawn relative to its mean, which is printed above
    it. The words of a single row are wrapped to fit a page.

    Args:
        rows: The label and the attention of each row.
        title: Title of the figure.
    """
    words = [i for i, word in enumerate(rows[0][1].words) if not word.special]
    aspect = _aspect([attention.image for _, attention in rows])
    if len(rows) == 1:
        figure, blocks = _blocks(len(words) + 1, 1, title, aspect)
        lines = [[axis for block in blocks for axis in block]]
    else:
        figure, lines = _rows(len(rows), len(words) + 1, title, aspect)
    for line, (label, attention) in zip(lines, rows, strict=True):
        small = _small(attention.image)
        _bare(line[0]).imshow(small)
        line[0].set_ylabel(label, fontsize=7)
        parts = [drawn_part(attention.maps[i], small.size) for i in words]
        means = [max(float(part.mean()), float(np.finfo(np.float32).tiny)) for part in parts]
        low, high = _range([part / mean for part, mean in zip(parts, means, strict=True)])
        for axis, i, mean in zip(line[1:], words, means, strict=True):
            label = f"{attention.words[i].text}\n{mean:.1%}"
            drawn = overlay(axis, attention.image, attention.maps[i] / mean, low, high, label)
        colour_bar(figure, drawn, line, "")
    figure.supxlabel(f"{rows[0][1].unit}, relative to its mean (the percentage above each map)", fontsize=7)
    return figure


def _rows(count: int, panels: int, title: str, aspect: float) -> tuple["Figure", list[list["Axes"]]]:
    """A figure with the axes of rows that are compared by column. Many rows are longer than a page."""
    side = min(LARGEST_PANEL, PAGE[0] / panels, (PAGE[1] / count - LABEL_HEIGHT) / aspect)
    side = max(side, SMALLEST_PANEL)
    figure = new_figure(panels * side + 1.5, count * (side * aspect + LABEL_HEIGHT) + 0.6, title)
    return figure, [list(line) for line in figure.subplots(count, panels, squeeze=False)]


def _label(tap: str, timestep: int, scale: float | None) -> str:
    return f"{tap}\nt = {timestep}" + ("" if scale is None else f", s = {scale:g}")


def pca_figure(
    images: Sequence[Image.Image], maps: Sequence[PCAMap], title: str, registers: Sequence[RegisterReport] = ()
) -> "Figure":
    """Feature maps as colours, one block per map with one panel per image (S3, Figure 2). The first has the images.

    Args:
        images: Upright RGB.
        maps: From [`~sdllava.analysis.features.pca_maps`].
        title: Title of the figure.
        registers: Registers of the same taps, timesteps and scales, whose positions are circled.
    """
    circled = {(r.tap, r.timestep, r.guidance_scale): r.outlying for r in registers}
    figure, blocks = _blocks(len(maps) + 1, len(images), title, _aspect(images))
    for axis, image in zip(blocks[0], images, strict=True):
        _bare(axis).imshow(_small(image))
    for block, pca_map in zip(blocks[1:], maps, strict=True):
        variance = " ".join(f"{share:.0%}" for share in pca_map.pca.explained_variance_ratio)
        setting = _label(pca_map.tap, pca_map.timestep, pca_map.guidance_scale)
        _label_block(block[0], f"{setting}\nvariance {variance}")
        found = circled.get((pca_map.tap, pca_map.timestep, pca_map.guidance_scale or 0.0))
        for i, (axis, image) in enumerate(zip(block, images, strict=True)):
            draw_colours(axis, pca_map.colours[i], image)
            if found is not None:
                _circle(axis, found[i], image)
    figure.supxlabel(
        "red, green, blue: principal components 1, 2, 3 (1st to 99th percentile), with their shares of the variance",
        fontsize=7,
    )
    return figure


def _circle(axes: "Axes", found: np.ndarray, image: Image.Image) -> None:
    """Circle positions of a grid over the padded square of an image."""
    rows, columns = np.nonzero(found)
    token = max(image.size) / len(found)
    left, top = _padding(image)
    places = (columns + 0.5) * token - left, (rows + 0.5) * token - top
    axes.scatter(*places, s=40, facecolors="none", edgecolors="white", linewidths=1)


def delta_figure(
    images: Sequence[Image.Image], questions: Sequence[str], deltas: Sequence[DeltaMap], title: str
) -> "Figure":
    """The effect of each question: |X_c - X_u| over its image, and the PCA of X_c - X_u (S3, Figures 5, 7 and 12).

    Args:
        images: Upright RGB, one per question.
        questions: What each image is conditioned on.
        deltas: From [`~sdllava.analysis.features.delta_maps`], with images in the order of the questions.
        title: Title of the figure.
    """
    figure, blocks = _blocks(len(deltas) + 1, 2 * len(images), title, _aspect(images))
    for i, (image, question) in enumerate(zip(images, questions, strict=True)):
        _bare(blocks[0][2 * i]).imshow(_small(image))
        blocks[0][2 * i].set_title(question, fontsize=7, loc="left", wrap=True)
        blocks[0][2 * i + 1].set_visible(False)
    for block, delta in zip(blocks[1:], deltas, strict=True):
        sizes = [_small(image).size for image in images]
        low, high = _range([drawn_part(grid, size) for grid, size in zip(delta.heat, sizes, strict=True)])
        _label_block(block[0], f"{_label(delta.tap, delta.timestep, None)}, {low:.2f} to {high:.2f}")
        pca = delta.pca()
        for i, image in enumerate(images):
            overlay(block[2 * i], image, delta.heat[i], low, high)
            draw_colours(block[2 * i + 1], pca.colours[i], image)
    figure.supxlabel(
        "left: |X_c - X_u| relative to the mean |X_u|, in the range of the label; right: PCA of X_c - X_u", fontsize=7
    )
    return figure
