"""Leakage: likelihoods against a token-by-token computation, and a model that is known to leak."""

import numpy as np
import pytest
import torch
from fixtures_evaluation import write_captions, write_mmvp

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel
from sdllava.evaluation.leakage import LeakageSetting, leakage_markdown, leakage_sweep, text_log_likelihood
from sdllava.evaluation.responder import Responder


def one_by_one(responder, sample, text, question):
    """log p of each token from its own unpadded forward, the text grown token by token."""
    ids = responder.tokenizer(text, add_special_tokens=False)["input_ids"]
    values = []
    for end in range(len(ids)):
        inputs = responder.inputs(responder.prepare([sample], [question]))
        prefix = torch.tensor([ids[:end]], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], prefix], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        extra = {"diffusion_guidance_scales": responder.guidance_scales} if responder.guidance_scales else {}
        with torch.no_grad():
            logits = responder.model(**inputs, **extra).logits[0, -1].float()
        values.append(logits.log_softmax(-1)[ids[end]].item())
    return np.mean(values)


def test_likelihood_of_ours_equals_token_by_token(ours, tmp_path):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path, 4))
    texts = ["a red dog", "a cat", "the dog is red and blue", "no"]
    questions = [["a dog"], [""], ["two cats"], ["a"]]
    responder = Responder(ours.model, ours.processor, guidance_scales=[2.0])
    batched = text_log_likelihood(responder, samples, texts, questions, batch_size=3)
    for row in (0, 2, 3):
        expected = one_by_one(responder, samples[row], texts[row], questions[row])
        assert batched[row] == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match="'' has no tokens"):
        text_log_likelihood(responder, samples[:1], [""], questions[:1])


def test_question_and_scale_reach_the_language_model(ours, tmp_path):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path, 2))[:1]

    def value(question, scale):
        responder = Responder(ours.model, ours.processor, guidance_scales=[scale])
        return text_log_likelihood(responder, samples, ["a red dog"], [[question]])[0]

    base = value("a red dog", 4.0)
    assert abs(value("two cats", 4.0) - base) > 1e-4
    assert abs(value("a red dog", 1.0) - base) > 1e-4
    assert value("a red dog", 0.0) == pytest.approx(value("", 4.0), abs=1e-5)


def test_likelihood_of_transformers_llava(tiny_llava, tmp_path):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path, 2))
    responder = Responder(*tiny_llava)
    values = text_log_likelihood(responder, samples, ["a red dog", "cat"], [[""], [""]])
    assert values[0] == pytest.approx(one_by_one(responder, samples[0], "a red dog", [""]), abs=2e-5)


def setting(tmp_path, images=4):
    benchmark = get_benchmark("captions")
    samples = benchmark.read(write_captions(tmp_path / "data", images))
    return LeakageSetting.make(benchmark, samples, {"id": "test"}, EvaluationOptions(batch_size=4))


def test_donors_are_deranged_and_targets_literal(tmp_path):
    found = setting(tmp_path, 6)
    assert all(found.donor[s.id] != found.own[s.id] for s in found.samples)
    assert [s.target for s in found.with_donor_targets()] == [[found.donor[s.id]] for s in found.samples]
    every = LeakageSetting.make(found.benchmark, found.samples, {}, found.options, all_donor_captions=True)
    assert every.donor == found.donor
    assert all(len(s.target) == 2 and found.donor[s.id] in s.target for s in every.with_donor_targets())


@pytest.mark.usefixtures("simple_tokens", "few_resamples")
def test_a_parrot_leaks_and_the_sweep_finds_the_smallest_scale(ours, tmp_path, monkeypatch):
    """A model that repeats its diffusion prompt from s = 2 on, and finds it likelier in proportion to s."""

    def parrot(self, samples, generation, questions=None, *rest):
        leaking = self.guidance_scales[0] >= 2
        return [q[0] if leaking and q[0] else "a photo of it" for q in questions]

    def likelihood(responder, samples, texts, questions, batch_size=8):
        heard = np.array([text == question[0] for text, question in zip(texts, questions, strict=True)])
        noise = np.linspace(-1e-3, 1e-3, len(samples))
        return -3.0 + noise + heard * max(0.0, responder.guidance_scales[0] - 1) * 0.5

    monkeypatch.setattr(Responder, "reply", parrot)
    monkeypatch.setattr("sdllava.evaluation.leakage.text_log_likelihood", likelihood)
    result = leakage_sweep([("parrot", ours)], setting(tmp_path), tmp_path / "out", (0.0, 1.0, 1.5, 2.0, 4.0))
    assert result["smallest_leaking_scale"]["parrot"] == {"captions": 2.0, "likelihood": 1.5}
    by_scale = {row["scale"]: row for row in result["rows"]}
    metric = result["metric"]
    assert by_scale[4.0]["mismatched"][metric] == pytest.approx(1000)  # the donor's caption word for word
    assert by_scale[1.0]["mismatched"][metric] == by_scale[1.0]["control"][metric]
    assert by_scale[4.0]["task"][metric] > by_scale[1.0]["task"][metric]
    assert by_scale[2.0]["likelihood_gain"]["mean"] == pytest.approx(0.5)
    assert by_scale[4.0]["excess"]["paired"]
    table = (tmp_path / "out" / "leakage.md").read_text()
    assert "- parrot, leakage threshold by captions: s = 2" in table


def test_the_papers_rows_are_in_the_table_of_coco_captions():
    interval = {"difference": 9.0, "interval": [8.0, 10.0]}
    row = {"model": "M", "scale": 4.0, "excess": interval, "likelihood_gain": {"mean": 0.5, "interval": [0.4, 0.6]}}
    row |= {name: {"CIDEr": value} for name, value in (("task", 50.0), ("no_text_task", 40.0), ("control", 1.0))}
    row |= {"task_interval": [45.0, 55.0], "other_tasks": {"mmvp": {"score": 33.3, "interval": [25.0, 40.0]}}}
    result = {"benchmark": "captions", "metric": "CIDEr", "samples": 5000, "seed": 0}
    result["rows"] = [{**row, "mismatched": {"CIDEr": 10.0}}]
    result["smallest_leaking_scale"] = {"M": {"captions": 4.0, "likelihood": None}}
    table = leakage_markdown(result)
    assert (
        "| M | 4 | 33.30 [25.00, 40.00] | 50.00 [45.00, 55.00] | 40.00 | 10.00 | 1.00 | +9.00 [+8.00, +10.00] | "
        "+0.500 [+0.400, +0.600] |\n"
        "| SDXL; GT captions, no CFG (S4 Table 6) | | | | | 7.32 | | | |\n"
    ) in table
    assert "| SD 2.1; GT captions, s=4 (S3 4.3) | | | | | 12.97 | | | |" in table
    assert table.endswith(
        "- M, leakage threshold by captions: s = 4\n"
        "- M, leakage threshold by likelihood: above every s of this sweep\n\n"
        "The threshold is the smallest s at which the 95% interval of the excess or of the gain is above 0.\n"
    )
    assert "12.97" not in leakage_markdown({**result, "benchmark": "mini_captions"})


def test_plain_llava_cannot_be_swept(tiny_llava, tmp_path):
    with pytest.raises(ValueError, match="'llava' has no diffusion tower with a single guidance scale"):
        leakage_sweep([("llava", LoadedModel("llava", None, *tiny_llava))], setting(tmp_path), tmp_path / "out")
