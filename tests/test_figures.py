"""Figures fit a page, maps and images share an aspect ratio, bars have Wilson intervals, small samples a warning."""

import numpy as np
import PIL.Image
import pytest

from sdllava.analysis.attention import HeatMap, QuestionAttention, Word
from sdllava.analysis.features import PCA, DeltaMap, PCAMap
from sdllava.analysis.plots import (
    LABEL_HEIGHT,
    PAGE,
    attention_figure,
    delta_figure,
    draw_colours,
    few_samples,
    heatmap_figure,
    layout,
    new_figure,
    pca_figure,
)
from sdllava.analysis.similarity import CKAResult, SimilarityGrid
from sdllava.analysis.similarity_plots import cka_figure, similarity_figure
from sdllava.evaluation.benchmarks.groups import group_counts, in_groups
from sdllava.evaluation.bootstrap import wilson

WIDE = PIL.Image.new("RGB", (200, 100), (200, 30, 30))


@pytest.mark.parametrize(("blocks", "panels"), [(1, 1), (3, 2), (66, 1), (66, 2), (20, 8), (5, 24)])
def test_panels_fit_a_page_and_are_as_large_as_possible(blocks, panels):
    rows, columns, side = layout(blocks, panels)
    assert rows * columns >= blocks
    assert (rows - 1) * columns < blocks
    assert columns * panels * side <= PAGE[0] + 1e-6
    assert rows * (side + LABEL_HEIGHT) <= PAGE[1] + 1e-6
    assert side > 0.35


def test_few_maps_stay_below_each_other_and_words_form_a_square():
    assert layout(3, 2)[:2] == (3, 1)
    assert layout(9, 1)[:2] == (3, 4)
    assert layout(8, 12, aspect=0.5)[2] == layout(8, 12)[2]  # limited by the width of the page
    assert layout(66, 2, aspect=0.5)[2] > layout(66, 2)[2]  # wide images leave room


def test_a_map_of_the_padded_square_is_cropped_to_the_image():
    axes = new_figure(4.5, 3, "").subplots()
    draw_colours(axes, np.zeros((4, 4, 3)), WIDE)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 200), (100, 0))
    assert axes.images[0].get_extent() == [0, 200, 150, -50]


@pytest.mark.parametrize(("image", "highest"), [(WIDE, 2.0), (WIDE.resize((100, 100)), 100.0)])
def test_the_padding_of_an_image_does_not_change_the_colours(image, highest):
    """Values of 1 and 2 over the image, and of 100 over its padding. A square image has no padding."""
    grid = np.ones((8, 8), np.float32)
    grid[:, 4:] = 2
    grid[[0, -1]] = 100
    attention = QuestionAttention([Word("red", (0,), False)], grid[None] / 100, image, "a place")
    heat = HeatMap(grid, grid, image, "a word", "a unit", "a place")
    delta = DeltaMap("U-L0-R0-B0-Out", 50, np.random.default_rng(0).normal(size=(1, 8, 8, 3)), grid[None])
    figures = [heatmap_figure(heat), delta_figure([image], ["red"], [delta], "title")]
    for figure in figures:
        assert [i.get_clim() for axes in figure.axes for i in axes.images if i.get_alpha()] == [(1.0, highest)]
    axes = attention_figure([("a layer", attention)], "title").axes[1]
    mean = 1.5 if highest == 2 else grid.mean()
    assert axes.get_title() == f"red\n{mean / 100:.1%}"
    assert axes.images[-1].get_clim() == pytest.approx((1 / mean, highest / mean), rel=1e-3)


def test_many_maps_become_a_grid():
    colours = np.zeros((2, 4, 4, 3))
    pca = PCA(np.zeros(3), np.zeros((3, 3)), np.array([0.5, 0.3, 0.1]), np.zeros(3), np.ones(3))
    maps = [PCAMap(f"U-L0-R{i}-B0-Out", 50, 0.0, colours, pca) for i in range(40)]
    figure = pca_figure([WIDE, WIDE], maps, "title")
    width, height = figure.get_size_inches()
    assert (width <= PAGE[0] + 1, height <= PAGE[1] + 1) == (True, True)
    assert 0.4 < width / height < 2
    assert sum(axes.get_visible() for axes in figure.axes) == 82


def test_similarity_at_one_timestep_is_drawn_as_bars():
    grid = SimilarityGrid(["a", "b"], [50], [0.0], np.array([[[0.5]], [[0.9]]]), np.zeros((2, 1, 1)), 3)
    (axes,) = similarity_figure(grid, {"CLIP": 0.2}, "title").axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.9, 0.2]


def fits_a_page(figure):
    width, height = figure.get_size_inches()
    return width <= PAGE[0] + 1 and height <= PAGE[1] + 1


@pytest.mark.parametrize("timesteps", [[50], [10, 50, 250]], ids=["bars", "matrix"])
def test_the_similarity_of_many_taps_fits_a_page(timesteps):
    taps, shape = [f"U-L0-R{i}-B0-Out" for i in range(94)], (94, len(timesteps), 1)
    grid = SimilarityGrid(taps, timesteps, [0.0], np.full(shape, 0.5), np.zeros(shape), 3)
    figure = similarity_figure(grid, {"CLIP": 0.2}, "title")
    assert fits_a_page(figure)
    names = [label.get_text() for axes in figure.axes[:3] for label in axes.get_yticklabels()]
    assert [name for name in names if not name.startswith("0.")][:95] == [*taps, "CLIP"]


@pytest.mark.parametrize(("num_taps", "scales"), [(2, [0.0, 1.0, 4.0]), (88, [0.0, 1.0, 4.0]), (88, [0.0, 1, 2, 4, 8])])
def test_cka_fits_a_page_and_the_cells_of_many_taps_have_no_numbers(num_taps, scales):
    taps = [f"U-L0-R{i}-B0-Out" for i in range(num_taps)]
    keys = [(tap, 50, scale) for scale in scales for tap in taps]
    figure = cka_figure(CKAResult(keys, np.full((len(keys), len(keys)), 0.5), 6), "title")
    assert fits_a_page(figure)
    first, *_, last, _ = (axes for axes in figure.axes if axes.get_visible())
    assert len(first.texts) == (4 if num_taps == 2 else 0)
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == taps[:: taps.index(labels[1])]
    assert len(labels) == 2 or 10 < len(labels) < 40
    assert len(last.lines) == (2 if num_taps == 2 else 0)  # 88 lines look alike
    assert len(last.images) == (0 if num_taps == 2 else 1)


def test_few_samples_are_named():
    assert few_samples(4, 30, "images") == "Only 4 images: the estimate is noisy. Use at least 30."
    assert few_samples(30, 30, "images") == ""


@pytest.mark.parametrize(
    ("percentage", "count", "low", "high"), [(100.0, 1, 20.65, 100.0), (0.0, 1, 0.0, 79.35), (50.0, 100, 40.38, 59.62)]
)
def test_wilson_intervals(percentage, count, low, high):
    assert wilson(percentage, count) == pytest.approx((low, high), abs=0.01)


def test_group_counts():
    units = [in_groups(["x"], correct=1.0), in_groups(["x", "y"], correct=0.0)]
    assert group_counts(units) == {"x": 2, "y": 1}
