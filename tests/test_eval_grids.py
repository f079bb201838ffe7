"""The heat map of timesteps and taps, and SugarCrepe's data."""

import json

import numpy as np
import pytest
from fixtures_evaluation import make_image

from sdllava.evaluation import plots
from sdllava.evaluation.benchmarks import get_matching_benchmark
from sdllava.evaluation.compare import Comparison, Run
from sdllava.evaluation.matching import MatchingOptions


def comparison(*towers, samples=300):
    scores = {"intervals_95": {"pairs": [0.0, 90.0]}, "samples": samples}
    runs = [
        Run(str(k), {"tower": tower, "scores": {"pairs": 10.0 * k}, **scores}, []) for k, tower in enumerate(towers)
    ]
    return Comparison("mmvp", "pairs", runs, [], [])


def test_the_heat_map_has_a_row_per_tap_and_a_column_per_timestep(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    towers = [{"taps": [tap], "timesteps": [t]} for t in (100, 10) for tap in ("U-L1", "D-L2")]
    plots.plot_timesteps(comparison(None, *towers[:3]), "grid.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "100"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["U-L1", "D-L2"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[30.0, 10.0], [np.nan, 20.0]])
    assert sorted(text.get_text() for text in axes.texts) == [f"{k}0.0\n[0.0, 90.0]" for k in (1, 2, 3)]
    plots.plot_timesteps(comparison(*towers, samples=4), "grid.png")
    assert [figure.axes[0].get_title() for figure in drawn] == [
        "mmvp: pairs, 95% intervals, 300 samples",
        "mmvp: pairs, 95% intervals, 4 samples\nFewer than 10 samples say little",
    ]
    with pytest.raises(ValueError, match="None of these results has a diffusion model's taps"):
        plots.plot_timesteps(comparison(None), "grid.png")


ITEM = {"caption": "A dog.", "negative_caption": "A cat."}


@pytest.mark.parametrize("layout", ["published", "lines"])
def test_sugarcrepe_is_read_in_both_layouts(tmp_path, layout):
    (tmp_path / "val2017").mkdir()
    make_image(1).save(tmp_path / "val2017" / "1.jpg")
    row = {"filename": "1.jpg", **ITEM}
    if layout == "published":
        (tmp_path / "data").mkdir()
        for kind in ("swap_obj", "add_att"):
            (tmp_path / "data" / f"{kind}.json").write_text(json.dumps({"0": row, "7": row}))
    else:
        rows = [{"kind": kind, "id": k, **row} for kind in ("add_att", "swap_obj") for k in ("0", "7")]
        (tmp_path / "sugarcrepe_part.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = get_matching_benchmark("sugarcrepe").read(tmp_path)
    assert [item.id for item in items] == ["add_att-0", "add_att-7", "swap_obj-0", "swap_obj-7"]
    assert items[0].texts == ("A dog.", "A cat.")
    assert items[0].images == (tmp_path / "val2017" / "1.jpg",)
    scores = get_matching_benchmark("sugarcrepe").score(
        items, [[[2.0], [1.0]], [[1.0], [1.0]], [[2.0], [0.0]], [[3.0], [0.0]]]
    )
    assert scores == {"average": 75.0, "add_att": 50.0, "swap_obj": 100.0}


def test_sugarcrepe_without_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither add_att.json, \.\.\. nor sugarcrepe\*\.jsonl"):
        get_matching_benchmark("sugarcrepe").read(tmp_path)
    (tmp_path / "sugarcrepe.jsonl").write_text(json.dumps({"kind": "add_att", **ITEM}))
    with pytest.raises(ValueError, match="the column 'filename' is missing"):
        get_matching_benchmark("sugarcrepe").read(tmp_path)


@pytest.mark.slow
def test_sugarcrepe_on_photographs(tmp_path):
    """The run, not the score: the miniature has never been trained on photographs."""
    from conftest import SHARED_DATA

    from sdllava.evaluation.match import load_matcher, match

    folder = SHARED_DATA / "coco"
    if not folder.is_dir():
        pytest.skip("the shared photographs are not here")
    options = MatchingOptions(timesteps=(489,), trials=1, score="denoising")
    matcher = load_matcher("mini", options)
    results = match(matcher, "sugarcrepe", tmp_path / "out", {"id": "mini"}, options, data=str(folder), limit=5)
    assert results["samples"] == 5
    assert results["chance"] == {"average": 50.0}
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {np.shape(record["scores"]) for record in records} == {(1, 1, 2, 1)}
