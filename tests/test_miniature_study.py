"""The study: read-outs with known answers, verdicts, and parts that are measured once and told as they are."""

import json

import pytest
import torch
from typer.testing import CliRunner

from research.miniature.__main__ import app
from research.miniature.study import guidance
from research.miniature.study.claims import claim, sentence, verdict
from research.miniature.study.page import cell, page
from research.miniature.study.readout import auc, fit_readout, one_hot, ordered_pairs, right_of, shares
from research.miniature.study.run import finished_part, run_study
from research.miniature.study.taps import quadrant_vectors
from sdllava.guidance import guide
from sdllava.scenes.world import CELLS


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        ([0.1, 2.0], "Holds"),
        ([-2.0, -0.1], "Does not hold"),
        ([-1.0, 1.0], "Undecided within the interval"),
        ([0.0, 0.0], "Undecided within the interval"),
        ([None, 1.0], "Cannot be told"),
        ([float("nan"), 1.0], "Cannot be told"),
    ],
)
def test_a_trend_holds_where_its_whole_interval_lies_above_zero(interval, told):
    assert verdict(interval) == told


def test_a_claim_is_the_higher_minus_the_lower_on_the_same_units():
    lower = right_of(["x"] * 40, [k % 2 for k in range(40)])
    higher = right_of(["x"] * 40, [1] * 40)
    found = claim("more is right", lower, higher, shares, "mean")
    assert found["difference"] == 50
    assert found["paired"]
    assert found["interval"][0] > 20
    assert sentence(found).startswith("**Holds**: more is right: +50.0 points [+")
    assert sentence(claim("more is right", higher, lower, shares, "mean")).startswith("**Does not hold**")


def test_a_read_out_finds_what_is_linear_and_nothing_in_noise():
    features = torch.randn(600, 20) * torch.logspace(-2, 2, 20) + 5
    label = (features[:, 3] - 5 > 0).long()
    fitted = fit_readout(features[:400], one_hot(label[:400], 2))
    assert (fitted(features[400:]).argmax(dim=1) == label[400:]).float().mean() > 0.93
    chance = torch.randint(2, (600,))
    fitted = fit_readout(features[:400], one_hot(chance[:400], 2))
    assert abs((fitted(features[400:]).argmax(dim=1) == chance[400:]).float().mean() - 0.5) < 0.12
    assert one_hot(torch.tensor([1, -100]), 2).tolist() == [[0, 1], [0, 0]]


def test_the_auc_counts_rightly_ordered_pairs_and_ties_by_half():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 5.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    positive = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    negative = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    units = ordered_pairs(scores, positive, negative)
    assert units == {"0": {"right": 2.0, "pairs": 2.0}, "1": {"right": 0.5, "pairs": 2.0}}
    assert auc({"right": 1.25, "pairs": 2.0}) == {"AUC": 0.625}


@pytest.mark.parametrize("side", [8, 16])
def test_each_quadrant_has_its_own_vector_in_the_order_of_cells(side):
    values = torch.zeros(2, side, side, 3)
    half = side // 2
    for number, _ in enumerate(CELLS):
        row, column = divmod(number, 2)
        values[1, half * row : half * (row + 1), half * column : half * (column + 1)] = number + 1
    vectors = quadrant_vectors(values)
    assert vectors.shape == (8, 16 * 3)
    assert vectors.unique(dim=1)[:, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_the_mean_over_scales_is_guidance_at_the_mean_scale():
    unconditional, conditional = torch.randn(5, 8), torch.randn(5, 8)
    found = guidance.ensembles(unconditional, conditional)
    torch.testing.assert_close(found[guidance.MEAN], guide(unconditional, conditional, 5 / 3))
    assert found[guidance.CONCAT].shape == (5, 24)
    assert torch.equal(found["s = 0"], unconditional)


@pytest.fixture
def parts(smoke_miniature, tmp_path):
    for name in ("checks.json", "diffusion", "clip", "llm"):
        (tmp_path / name).symlink_to(smoke_miniature / name)
    return tmp_path


def test_a_finished_part_is_read_not_measured_and_told_as_it_is(parts, monkeypatch):
    written = run_study(parts, parts / "docs", "smoke", ("e",))
    text, numbers = written.read_text(), finished_part(parts, "e")
    for name, row in numbers["rows"].items():
        assert f"| {name} | {cell(row['scores']['mean'], row['intervals']['mean'])} |" in text
    assert all(sentence(found) in text for found in numbers["claims"])
    assert "they are no result" in text
    assert "| vae | psnr " in text
    assert all(len(found["under_other_noise"]) == 2 for found in numbers["claims"])
    assert (parts / "docs/miniature/guidance.png").stat().st_size > 5000

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(guidance, "measure", measure)
    assert run_study(parts, parts / "docs", "smoke", ("e",)).read_text() == text
    numbers["rows"]["s = 4"]["scores"]["mean"] = 12.3
    assert "| s = 4 | 12.3 [" in page({"e": numbers}, {})
    settings = numbers["settings"] | {"weights": {"clip": "those of another"}}
    (parts / "study/e/settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"was measured with other weights: remove it and e\.json"):
        run_study(parts, parts / "docs", "smoke", ("e",))


def test_the_time_of_a_run_that_was_stopped_counts_in_the_next(parts, monkeypatch):
    clock = iter([0.0, 40.0, 100.0, 102.0])
    monkeypatch.setattr("research.miniature.study.run.time.process_time", lambda: next(clock))
    monkeypatch.setattr(guidance, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(parts, parts / "docs", "smoke", ("e",))
    monkeypatch.setattr(guidance, "measure", lambda *_: {"rows": {}, "claims": []})
    monkeypatch.setattr("research.miniature.study.page.write_page", lambda found, out: found["e"]["cpu_seconds"])
    assert run_study(parts, parts / "docs", "smoke", ("e",)) == 42


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--part", "g"], "'g' is no part of the study; the parts are a, b, c, d, e, f."),
        (["--scale", "gpu"], "'gpu' is not one of 'smoke', 'mini'"),
        (["--part", "a"], "holds no trained diffusion/vae: make the miniature's parts first"),
    ],
)
def test_what_cannot_be_studied_is_told_before_anything_is_written(options, told, tmp_path):
    result = CliRunner().invoke(app, ["study", "--from", str(tmp_path), "--out", str(tmp_path / "docs"), *options])
    assert result.exit_code
    assert told in " ".join(result.output.replace("│", " ").split())
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_study_goes_through_training_and_evaluation(parts):
    arguments = ["study", "--from", str(parts), "--out", str(parts / "docs"), "--scale", "smoke"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    text = (parts / "docs" / "miniature.md").read_text()
    assert text.count("\n## (") == 6
    assert text.count(".png)") == 6
    untold = finished_part(parts, "d")["rows"]["no captions"]
    assert untold["runs"]["its caption"]["scores"] == untold["runs"]["no caption"]["scores"]  # s = 0 sees no prompt
    assert untold["leakage"]["likelihood_gain"]["mean"] == pytest.approx(0, abs=1e-5)
    read = finished_part(parts, "d")["read_out"]
    assert read["s = 0"] == read["s = 0, dropout"]
    asked = finished_part(parts, "c")["rows"]
    assert set(asked["cross-attention, s = 4"]["prompts"]) == {"own question", "empty prompt", "wrong question"}
    assert set(asked["cross-attention, s = 0"]["prompts"]) == {"own question"}
