"""Leakage: how much of the diffusion model's prompt the language model can read back from the features.

The mismatched protocol (S3 4.3 and Table 9, S4 Table 6): every image is shown with the caption of another one, by a
seeded derangement, and the reply is scored against that caption as its single reference. The control is the same with
no text at all. The direct measure needs no generation: by how many nats a token the prompt's own text becomes likelier
under the language model when the features have seen it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .benchmarks.base import Benchmark, Sample
from .bootstrap import difference, intervals
from .diffusion_prompts import caption_of, derangement
from .evaluate import EvaluationOptions, LoadedModel, evaluate_samples, read_captions
from .processes import process_state
from .published import published_rows
from .responder import Responder
from .results import read_records, write_json, write_text

SCALES = (0.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0)


@torch.inference_mode()
def text_log_likelihood(
    responder: Responder,
    samples: Sequence[Sample],
    texts: Sequence[str],
    questions: Sequence[Sequence[str]],
    batch_size: int = 8,
) -> np.ndarray:
    """Log p(text | image features, prompt) per token in nats, of shape (samples,), teacher-forced.

    Args:
        texts: what the language model would have to say.
        questions: what the diffusion model was asked, one per image of each sample.

    Raises:
        ValueError: a text without tokens.
    """
    means = []
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        means += _batch_likelihood(responder, samples[rows], texts[rows], questions[rows])
    return np.array(means)


def _batch_likelihood(responder: Responder, samples, texts, questions) -> list[float]:
    inputs = responder.inputs(responder.prepare(samples, questions))
    if responder.guidance_scales is not None:
        inputs["diffusion_guidance_scales"] = responder.guidance_scales
    token_ids = [responder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if empty := [text for text, ids in zip(texts, token_ids, strict=True) if not ids]:
        raise ValueError(f"The text {empty[0]!r} has no tokens, so it has no likelihood.")
    longest = max(map(len, token_ids))
    device = inputs["input_ids"].device
    target = torch.full((len(texts), longest), responder.tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(target)
    for row, ids in enumerate(token_ids):
        target[row, : len(ids)] = torch.tensor(ids, device=device)
        mask[row, : len(ids)] = 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = responder.model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
    log_p = logits.log_softmax(dim=-1).gather(-1, target[..., None])[..., 0] * mask
    return (log_p.sum(dim=1) / mask.sum(dim=1)).tolist()


@dataclass(frozen=True)
class LeakageSetting:
    """What all runs of a sweep share."""

    benchmark: Benchmark
    samples: list[Sample]
    source: dict[str, Any]
    options: EvaluationOptions
    own: dict[str, str]
    donor: dict[str, str]
    donor_references: dict[str, list[str]]

    @classmethod
    def make(
        cls,
        benchmark: Benchmark,
        samples: list[Sample],
        source,
        options: EvaluationOptions,
        all_donor_captions: bool = False,
    ) -> "LeakageSetting":
        """The caption that belongs to each image, and the donor caption that does not.

        Args:
            all_donor_captions: scores against every caption of the donor image, not against the fed one alone.

        Raises:
            ValueError: the samples have no captions, or there are fewer than two.
        """
        captions = read_captions(options.captions)
        texts = [caption_of(sample, 0, captions) for sample in samples]
        donors = derangement(len(samples), options.seed)
        own = {sample.id: text for sample, text in zip(samples, texts, strict=True)}
        donor = {sample.id: texts[other] for sample, other in zip(samples, donors, strict=True)}
        references = {
            sample.id: samples[other].target if all_donor_captions else [texts[other]]
            for sample, other in zip(samples, donors, strict=True)
        }
        return cls(benchmark, samples, source, options, own, donor, references)

    def with_donor_targets(self) -> list[Sample]:
        return [replace(sample, target=self.donor_references[sample.id]) for sample in self.samples]


def leakage_sweep(
    models: Sequence[tuple[str, LoadedModel]],
    setting: LeakageSetting,
    output: str | Path,
    scales: Sequence[float] = SCALES,
    progress=None,
) -> dict[str, Any]:
    """Task score beside leakage for every model and guidance scale.

    Args:
        models: (label, model), for example one trained without and one with caption dropout.
        setting: benchmark, samples, captions and donors.
        scales: guidance scales s; s = 0 is the features without any text.

    Returns:
        `{"rows", "smallest_leaking_scale", ...}`, also written as `leakage.json` and `leakage.md` (one table).

    Raises:
        ValueError: a model without a diffusion tower, or with several guidance scales at once.
    """
    if process_state().num_processes > 1:
        raise ValueError("A leakage sweep runs in one process; start it without accelerate launch.")
    for label, loaded in models:
        config = getattr(loaded.model.config, "diffusion_config", None)
        if config is None or len(config.guidance_scales) != 1:
            raise ValueError(f"The model {label!r} has no diffusion tower with one guidance scale: nothing to sweep.")
    output, rows, smallest = Path(output), [], {}
    for label, loaded in models:
        found = _sweep_model(label, loaded, setting, output / label, scales, progress)
        rows += found
        smallest[label] = {
            measure: next((row["scale"] for row in found if row[key]["interval"][0] > 0), None)
            for measure, key in (("captions", "excess"), ("likelihood", "likelihood_gain"))
        }
    result = {
        "benchmark": setting.benchmark.name,
        "metric": setting.benchmark.metric,
        "samples": len(setting.samples),
        "seed": setting.options.seed,
        "rows": rows,
        "smallest_leaking_scale": smallest,
    }
    write_json(output / "leakage.json", result)
    write_text(output / "leakage.md", leakage_markdown(result))
    return result


def _sweep_model(label, loaded, setting: LeakageSetting, output: Path, scales, progress) -> list[dict]:
    metric, benchmark, samples = setting.benchmark.metric, setting.benchmark, setting.samples
    nothing = {sample.id: [""] for sample in samples}
    own = {sample.id: [setting.own[sample.id]] for sample in samples}
    donor = {sample.id: [setting.donor[sample.id]] for sample in samples}

    def run(name: str, which: Sequence[Sample], questions, scale: float) -> tuple[dict, list[dict]]:
        options = replace(setting.options, guidance=(scale,), blind=False)
        folder = output / name
        results = evaluate_samples(loaded, benchmark, which, setting.source, folder, options, None, progress, questions)
        return results, read_records(folder / "samples.jsonl")

    plain, records = run("no-text", samples, nothing, 1.0)
    control = [{**record, "target": setting.donor_references[record["id"]]} for record in records]
    control_units = benchmark.units(control)
    control_scores = benchmark.score(control)
    texts = [setting.donor[sample.id] for sample in samples]
    baseline = _likelihood(loaded, benchmark, samples, texts, nothing, 1.0, setting)
    rows = []
    for scale in scales:
        task, _ = run(f"task-s{scale:g}", samples, own, scale)
        mismatched, records = run(f"mismatched-s{scale:g}", setting.with_donor_targets(), donor, scale)
        gains = _likelihood(loaded, benchmark, samples, texts, donor, scale, setting) - baseline
        rows.append(
            {
                "model": label,
                "scale": scale,
                "task": task["scores"],
                "no_text_task": plain["scores"],
                "mismatched": mismatched["scores"],
                "control": control_scores,
                "excess": difference(control_units, benchmark.units(records), benchmark.scores, metric),
                "likelihood_gain": _mean_with_interval(gains),
            }
        )
    return rows


def _likelihood(loaded, benchmark, samples, texts, questions, scale, setting) -> np.ndarray:
    responder = Responder(loaded.model, loaded.processor, benchmark.template, [scale])
    asked = [questions[sample.id] for sample in samples]
    return text_log_likelihood(responder, samples, texts, asked, setting.options.batch_size)


def _mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    units = {str(k): {"mean": float(value)} for k, value in enumerate(values)}
    return {"mean": float(values.mean()), "interval": intervals(units, dict)["mean"]}


def leakage_markdown(result: dict[str, Any]) -> str:
    """The one table of a sweep, COCO's with the papers' rows."""
    metric = result["metric"]
    lines = [
        f"# Leakage by guidance scale ({result['samples']} images, seed {result['seed']})",
        "",
        f"| model | s | task {metric} | task without text | {metric} against the wrong prompt | control | "
        "excess [95%] | likelihood gain, nats/token [95%] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        excess, gain = row["excess"], row["likelihood_gain"]
        lines.append(
            f"| {row['model']} | {row['scale']:g} | {row['task'][metric]:.2f} | {row['no_text_task'][metric]:.2f} | "
            f"{row['mismatched'][metric]:.2f} | "
            f"{row['control'][metric]:.2f} | {excess['difference']:+.2f} [{excess['interval'][0]:+.2f}, "
            f"{excess['interval'][1]:+.2f}] | {gain['mean']:+.3f} [{gain['interval'][0]:+.3f}, "
            f"{gain['interval'][1]:+.3f}] |"
        )
    for row in published_rows("mismatched captions") if result["benchmark"] == "captions" else ():
        if metric in row.scores:
            lines.append(f"| {row.model} ({row.source}) | | | | {row.scores[metric]:.2f} | | | |")
    lines.append("")
    for label, found in result["smallest_leaking_scale"].items():
        for measure, scale in found.items():
            text = "no s of this sweep leaks" if scale is None else f"the smallest s that leaks is {scale:g}"
            lines.append(f"- {label}, by {measure}: {text}")
    return "\n".join(lines) + "\n"
