"""The study: read-outs with known answers, verdicts, parts that are measured once, and the page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trl import SFTConfig
from typer.testing import CliRunner

from research.miniature.__main__ import app
from research.miniature.stages import RECIPES, STAGES
from research.miniature.study import captions, guidance, matching, questions, similarity, systems, taps, training
from research.miniature.study.claims import claim, sentence, verdict
from research.miniature.study.page import cell, page
from research.miniature.study.readout import answer_units, auc, fit_readout, one_hot, ordered_pairs, shares
from research.miniature.study.run import PARTS, finished_part, run_study
from research.miniature.study.scales import STUDY_SCALES
from research.miniature.study.systems_page import write_systems_page
from research.miniature.study.taps import quadrant_vectors
from sdllava.evaluation import bootstrap
from sdllava.evaluation.benchmarks import mini
from sdllava.guidance import guide
from sdllava.scenes.world import CELLS
from sdllava.train.arguments import AdapterArguments, DataArguments, ModelArguments
from sdllava.train.recipe_loading import parse_arguments


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.1, 2.0], "Holds"),
        ([-2.0, -0.1], "Does not hold"),
        ([-1.0, 1.0], "Undecided within the interval"),
        ([0.0, 0.0], "Undecided within the interval"),
        ([None, 1.0], "Not measurable"),
        ([float("nan"), 1.0], "Not measurable"),
    ],
)
def test_a_trend_holds_if_its_whole_interval_is_above_zero(interval, expected):
    assert verdict(interval) == expected


def test_a_claim_is_the_higher_minus_the_lower_on_the_same_units():
    lower = answer_units(["x"] * 40, [k % 2 for k in range(40)])
    higher = answer_units(["x"] * 40, [1] * 40)
    found = claim("more is correct", lower, higher, shares, "mean")
    assert found["difference"] == 50
    assert found["paired"]
    assert found["interval"][0] > 20
    assert sentence(found).startswith("**Holds**: more is correct: +50.0 points [+")
    assert sentence(claim("more is correct", higher, lower, shares, "mean")).startswith("**Does not hold**")


def test_a_read_out_predicts_a_linear_label_and_not_noise():
    features = torch.randn(600, 20) * torch.logspace(-2, 2, 20) + 5
    label = (features[:, 3] - 5 > 0).long()
    fitted = fit_readout(features[:400], one_hot(label[:400], 2))
    assert (fitted(features[400:]).argmax(dim=1) == label[400:]).float().mean() > 0.93
    chance = torch.randint(2, (600,))
    fitted = fit_readout(features[:400], one_hot(chance[:400], 2))
    assert abs((fitted(features[400:]).argmax(dim=1) == chance[400:]).float().mean() - 0.5) < 0.12
    assert one_hot(torch.tensor([1, -100]), 2).tolist() == [[0, 1], [0, 0]]


def test_the_auc_counts_correctly_ordered_pairs_and_half_of_the_ties():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 5.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    positive = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    negative = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    units = ordered_pairs(scores, positive, negative)
    assert units == {"0": {"correct": 2.0, "pairs": 2.0}, "1": {"correct": 0.5, "pairs": 2.0}}
    assert auc({"correct": 1.25, "pairs": 2.0}) == {"AUC": 0.625}


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


def test_a_finished_part_is_loaded_and_not_measured_again(parts, monkeypatch):
    monkeypatch.setitem(PARTS, "e", replace(PARTS["e"], more_noise=1))
    (written,) = run_study(parts, parts / "docs", "smoke", ("e",))
    text, numbers = written.read_text(), finished_part(parts, "e")
    for name, row in numbers["rows"].items():
        assert f"| {name} | {cell(row['scores']['mean'], row['intervals']['mean'])} |" in text
    assert all(sentence(found) in text for found in numbers["claims"])
    assert "They are not results." in text
    assert "| vae | psnr " in text
    assert all(len(found["under_other_noise"]) == 1 for found in numbers["claims"])
    assert (parts / "docs/figures/guidance.png").stat().st_size > 5000

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(guidance, "measure", measure)
    assert run_study(parts, parts / "docs", "smoke", ("e",))[0].read_text() == text
    numbers["rows"]["s = 4"]["scores"]["mean"] = 12.3
    assert "| s = 4 | 12.3 [" in page({"e": numbers}, {})
    numbers["settings"]["weights"]["clip"] = "another"
    (parts / "study/e.json").write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match=r"e\.json' was written with other settings: weights\.clip is 'another' there"):
        run_study(parts, parts / "docs", "smoke", ("e",))


def test_a_stopped_part_of_other_weights_is_not_resumed(parts, monkeypatch):
    monkeypatch.setattr(guidance, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(parts, parts / "docs", "smoke", ("e",))
    settings = json.loads((parts / "study/e/settings.json").read_text())
    (parts / "study/e/settings.json").write_text(json.dumps(settings | {"scale": "mini"}))
    with pytest.raises(ValueError, match="was written with other settings: scale is 'mini' there and 'smoke' here"):
        run_study(parts, parts / "docs", "smoke", ("e",))


def test_the_cpu_time_includes_stopped_runs(parts, monkeypatch):
    clock = iter([0.0, 40.0, 100.0, 102.0])
    monkeypatch.setattr("research.miniature.study.run.time.process_time", lambda: next(clock))
    monkeypatch.setattr(guidance, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(parts, parts / "docs", "smoke", ("e",))
    monkeypatch.setattr(guidance, "measure", lambda *_: {"rows": {}, "claims": []})
    monkeypatch.setattr("research.miniature.study.run.write_page", lambda found, out: found["e"]["cpu_seconds"])
    assert run_study(parts, parts / "docs", "smoke", ("e",)) == [42]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "z"], "Part 'z' of the study is unknown. Use one of a, b, c, d, e, f, g, h, i, j, k, l."),
        (["--scale", "gpu"], "'gpu' is not one of 'smoke', 'mini'"),
        (["--part", "a"], "does not contain the trained part 'diffusion/vae'."),
    ],
)
def test_unusable_arguments_end_the_command_before_anything_is_written(options, message, tmp_path):
    result = CliRunner().invoke(app, ["study", "--from", str(tmp_path), "--out", str(tmp_path / "docs"), *options])
    assert result.exit_code
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not any(tmp_path.iterdir())


KINDS = (ModelArguments, AdapterArguments, DataArguments, SFTConfig)
FOLDER = Path(guidance.__file__).parents[1]
TRENDS = {
    "a": list(taps.TRENDS),
    "b": list(matching.TRENDS.values()),
    "c": [
        f"{part}: {trend}" for part in ("pairs", "questions") for trend in (*questions.TRENDS, *questions.PROMPT_TRENDS)
    ],
    "d": [*captions.TRENDS, captions.REPEATED, captions.LIKELIER, captions.READ, *captions.READ_TRENDS],
    "e": list(guidance.TRENDS),
    "f": [*similarity.SIMILARITY_TRENDS, *similarity.CKA_TRENDS],
}


def test_the_page_is_what_the_generator_writes_from_its_numbers():
    numbers = json.loads((FOLDER / "study.json").read_text(encoding="utf-8"))
    figures = ("taps", "matching", "questions", "captions", "guidance", "similarity")
    pictures = {part: f"figures/{name}.png" for part, name in zip(numbers, figures, strict=True)}
    assert (FOLDER / "study.md").read_text(encoding="utf-8") == page(numbers, pictures)


def test_the_page_of_systems_is_what_the_generator_writes_from_its_numbers(tmp_path):
    numbers = json.loads((FOLDER / "systems.json").read_text(encoding="utf-8"))
    assert write_systems_page(numbers, tmp_path).read_text() == (FOLDER / "systems.md").read_text(encoding="utf-8")


def test_the_page_has_the_trends_that_are_measured():
    numbers = json.loads((FOLDER / "study.json").read_text(encoding="utf-8"))
    assert {part: [found["trend"] for found in numbers[part]["claims"]] for part in numbers} == TRENDS


@pytest.mark.parametrize("name", ["README.md", "making.md", "study.md", "mmdit.md", "systems.md"])
def test_links_and_commands_of_the_pages_exist(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith("https://") or (FOLDER / link).exists(), link
    assert "sdllava mini train" not in text
    assert "sdllava mini study" not in text


def test_every_stage_has_its_recipe():
    from sdllava.train.recipe_loading import load_recipe

    for name in (*STAGES, *(f"study-{stage}" for stage in STAGES)):
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        assert recipe["stage"] == name.removeprefix("study-")
        assert recipe["spatial_merge_size"] == 2  # from common.yaml


@pytest.mark.slow
@pytest.mark.usefixtures("simple_tokens")
def test_the_whole_study_goes_through_training_and_evaluation(parts, monkeypatch):
    for part in "abcdef":
        monkeypatch.setitem(PARTS, part, replace(PARTS[part], more_noise=0))
    for name, count in {"QUESTIONS": 54, "COMPOSITIONS": 27, "PAIRS_PER_PATTERN": 2, "CAPTIONS": 8}.items():
        monkeypatch.setattr(mini, name, count)
    monkeypatch.setattr(bootstrap, "REPLICATES", 50)
    compared = {questions.PLAIN, questions.BEST}
    monkeypatch.setattr(questions, "VARIANTS", [v for v in questions.VARIANTS if v.name in compared])
    monkeypatch.setattr(questions, "TRENDS", {t: pair for t, pair in questions.TRENDS.items() if compared >= {*pair}})
    described = {v: dropout for v, dropout in captions.VARIANTS.items() if v.guidance in (0.0, 4.0)}
    monkeypatch.setattr(captions, "VARIANTS", described)
    arguments = ["study", "--from", str(parts), "--out", str(parts / "docs"), "--scale", "smoke"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    text = (parts / "docs" / "study.md").read_text()
    assert text.count("\n## (") == 6
    assert text.count(".png)") == 6
    plain = finished_part(parts, "d")["rows"]["no captions"]
    assert plain["runs"]["own caption"]["scores"] == plain["runs"]["empty prompt"]["scores"]  # s = 0 has no prompt
    assert plain["leakage"]["likelihood_gain"]["mean"] == pytest.approx(0, abs=1e-5)
    read = finished_part(parts, "d")["read_out"]
    assert read["s = 0"] == read["s = 0, dropout"]
    rows = finished_part(parts, "c")["rows"]
    assert set(rows["cross-attention, s = 4"]["prompts"]) == {"own question", "empty prompt", "wrong question"}
    assert set(rows["cross-attention, s = 0"]["prompts"]) == {"own question"}


def test_every_system_has_arguments_of_the_train_command(parts, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training, "cache", lambda arguments, *_: given.append(arguments))
    monkeypatch.setattr(training, "train", given.append)
    monkeypatch.setattr(systems, "write_scenes", lambda *_: None)
    every = (*systems.FUSIONS, *systems.WORKSHOP)
    for system in every:
        systems.train_system(parts, tmp_path, system, STUDY_SCALES["smoke"])
    assert len(given) == 4 * len(every)  # two stages, each with its cache
    parsed = [parse_arguments(KINDS, [*arguments, "--use_cpu"]) for arguments in given]
    for system, (model, adapter, *_) in zip(every, parsed[3::4], strict=True):
        assert (model.stage, model.fusion) == ("finetune", system.variant.fusion)
        assert model.ensemble == system.both.get("ensemble")
        assert adapter.unet_lora_r == system.finetune.get("unet_lora_r", AdapterArguments().unet_lora_r)


@pytest.mark.slow
@pytest.mark.usefixtures("simple_tokens")
def test_systems_of_the_workshop_paper_train_in_small(parts, monkeypatch):
    """With pseudo-captions and refinement. The recipes' tests train the other fusions, LoRA and the captioner."""
    for name, count in {"QUESTIONS": 54, "COMPOSITIONS": 27, "PAIRS_PER_PATTERN": 1, "CAPTIONS": 4}.items():
        monkeypatch.setattr(mini, name, count)
    monkeypatch.setattr(bootstrap, "REPLICATES", 50)
    names = {systems.NO_CAPTION, systems.GT_CAPTION}
    monkeypatch.setattr(systems, "WORKSHOP", [system for system in systems.WORKSHOP if system.name in names])
    monkeypatch.setattr(systems, "FUSIONS", systems.FUSIONS[:1])
    arguments = ["study", "--from", str(parts), "--out", str(parts / "docs-g"), "--scale", "smoke"]
    arguments += ["--part", "g", "--part", "l"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output[-1500:]
    assert set(finished_part(parts, "g")["rows"]) == {systems.BASE}
    assert set(finished_part(parts, "l")["rows"]) == names | {f"{systems.GT_CAPTION}, pseudo-captions"}
    text = (parts / "docs-g" / "systems.md").read_text()
    assert text.count("## (") == 2
    assert not (parts / "docs-g" / "study.md").exists()
