"""Leakage: how much of the diffusion model's prompt the language model can read from the features.

In the mismatched protocol (S3 4.3 and Table 9, S4 Table 6) the diffusion model is conditioned on the caption of another
image, by a seeded derangement, and the reply is scored against that caption as its single reference. The control uses
the empty prompt. The direct measure needs no generation: it is the gain in the language model's log-likelihood of the
prompt's text, in nats per token, when the features are conditioned on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic_files import write_json, write_text
from .benchmarks.base import Benchmark, Sample
from .bootstrap import difference, intervals
from .evaluate import EvaluationOptions, LoadedModel, evaluate_samples, read_captions
from .processes import gather_records, process_state
from .prompt_choices import caption_of, derangement
from .published import published_rows
from .responder import Responder
from .results import read_records
from .runner import Progress, Questions

SCALES = (0.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0)
TaskScores = Mapping[str, Mapping[float, Mapping[str, Any]]]
"""By model's label and guidance scale: scores on other benchmarks by name, each with `score` and `interval`."""


@torch.inference_mode()
def text_log_likelihood(
    responder: Responder,
    samples: Sequence[Sample],
    texts: Sequence[str],
    questions: Sequence[Sequence[str]],
    batch_size: int = 8,
) -> np.ndarray:
    """Log-likelihood of each text as the reply, in nats per token, with teacher forcing.

    Args:
        responder: The model.
        samples: Images and prompts.
        texts: One reply per sample.
        questions: The diffusion model's prompts, one per image of each sample.
        batch_size: Samples per batch.

    Returns:
        `np.ndarray` of shape `(samples,)`.

    Raises:
        ValueError: A text has no tokens.
    """
    means = []
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        means += _batch_likelihood(responder, samples[rows], texts[rows], questions[rows])
    return np.array(means)


def _batch_likelihood(
    responder: Responder, samples: Sequence[Sample], texts: Sequence[str], questions: Sequence[Sequence[str]]
) -> list[float]:
    inputs = responder.inputs(responder.prepare(samples, questions))
    if responder.guidance_scales is not None:
        inputs["diffusion_guidance_scales"] = responder.guidance_scales
    token_ids = [responder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if empty := [text for text, ids in zip(texts, token_ids, strict=True) if not ids]:
        raise ValueError(f"The text {empty[0]!r} has no tokens, so it has no likelihood. Leave it out.")
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
    """The benchmark, samples and captions that all runs of a sweep share.

    Attributes:
        benchmark: A captioning benchmark.
        samples: Its samples.
        source: `{"id", "revision"}` of the data.
        options: Of every run; `guidance` is replaced.
        own: Sample id -> caption of its image.
        donor: Sample id -> caption of another image.
        donor_references: Sample id -> reference captions of the mismatched protocol.
    """

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
        source: dict[str, Any],
        options: EvaluationOptions,
        all_donor_captions: bool = False,
    ) -> "LeakageSetting":
        """Pair each image with its own caption and with the caption of a donor image.

        Args:
            benchmark: A captioning benchmark.
            samples: Its samples.
            source: `{"id", "revision"}` of the data.
            options: Of every run.
            all_donor_captions: Whether to score against all captions of the donor image, not only the one in the
                prompt.

        Raises:
            ValueError: The samples have no captions, or there are fewer than two.
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
        """The samples with the donors' captions as references."""
        return [replace(sample, target=self.donor_references[sample.id]) for sample in self.samples]


def leakage_sweep(
    models: Sequence[tuple[str, LoadedModel]],
    setting: LeakageSetting,
    output: str | Path,
    scales: Sequence[float] = SCALES,
    progress: Progress | None = None,
    tasks: TaskScores | None = None,
) -> dict[str, Any]:
    """Measure task score and leakage for every model and guidance scale. Processes share the samples.

    Args:
        models: Pairs of label and model, for example one trained with and one without caption dropout.
        setting: Benchmark, samples, captions and donors.
        output: Folder of the results.
        scales: Guidance scales s. Features with s = 0 do not depend on the prompt.
        progress: Called with the number of answered samples and their total, in every run.
        tasks: Scores on other benchmarks at these scales, shown in the same table.

    Returns:
        `dict`: `rows`, `smallest_leaking_scale` and settings, also written as `leakage.json` and, as one table,
        `leakage.md`. Empty on other processes than the main one.

    Raises:
        ValueError: A model has no diffusion tower or several guidance scales.
    """
    for label, loaded in models:
        config = getattr(loaded.model.config, "diffusion_config", None)
        if config is None or len(config.guidance_scales) != 1:
            raise ValueError(
                f"The model {label!r} has no diffusion tower with a single guidance scale. Choose another model for "
                "--leakage."
            )
    output, rows, smallest = Path(output), [], {}
    for label, loaded in models:
        found = _sweep_model(label, loaded, setting, output / label, scales, progress)
        for row in found:
            row["other_tasks"] = dict((tasks or {}).get(label, {}).get(row["scale"], {}))
        rows += found
        smallest[label] = {
            measure: next((row["scale"] for row in found if row[key]["interval"][0] > 0), None)
            for measure, key in (("captions", "excess"), ("likelihood", "likelihood_gain"))
        }
    if not process_state().is_main_process:
        return {}
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


def _sweep_model(
    label: str,
    loaded: LoadedModel,
    setting: LeakageSetting,
    output: Path,
    scales: Sequence[float],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    metric, benchmark, samples = setting.benchmark.metric, setting.benchmark, setting.samples
    empty = {sample.id: [""] for sample in samples}
    own = {sample.id: [setting.own[sample.id]] for sample in samples}
    donor = {sample.id: [setting.donor[sample.id]] for sample in samples}

    def run(name: str, which: Sequence[Sample], questions: Questions, scale: float) -> tuple[dict, list[dict]]:
        options = replace(setting.options, guidance=(scale,), blind=False)
        folder = output / name
        results = evaluate_samples(loaded, benchmark, which, setting.source, folder, options, None, progress, questions)
        return results, read_records(folder / "samples.jsonl") if results else []

    plain, records = run("no-text", samples, empty, 1.0)
    control = [{**record, "target": setting.donor_references[record["id"]]} for record in records]
    texts = [setting.donor[sample.id] for sample in samples]
    baseline = _likelihood(loaded, setting, texts, empty, 1.0)
    rows = []
    for scale in scales:
        task, _ = run(f"task-s{scale:g}", samples, own, scale)
        mismatched, records = run(f"mismatched-s{scale:g}", setting.with_donor_targets(), donor, scale)
        likelihood = _likelihood(loaded, setting, texts, donor, scale)
        if baseline is None or likelihood is None:  # not the main process
            continue
        rows.append(
            {
                "model": label,
                "scale": scale,
                "task": task["scores"],
                "task_interval": task["intervals_95"][metric],
                "no_text_task": plain["scores"],
                "mismatched": mismatched["scores"],
                "control": benchmark.score(control),
                "excess": difference(benchmark.units(control), benchmark.units(records), benchmark.scores, metric),
                "likelihood_gain": _mean_with_interval(likelihood - baseline),
            }
        )
    return rows


def _likelihood(
    loaded: LoadedModel, setting: LeakageSetting, texts: Sequence[str], questions: Questions, scale: float
) -> np.ndarray | None:
    """The likelihood of each text on the main process, None on the others."""
    responder = Responder(loaded.model, loaded.processor, setting.benchmark.template, [scale])
    state, samples = process_state(), setting.samples
    mine = range(len(samples))[state.process_index :: state.num_processes]
    prompts = [questions[samples[k].id] for k in mine]
    values = text_log_likelihood(
        responder, [samples[k] for k in mine], [texts[k] for k in mine], prompts, setting.options.batch_size
    )
    own = [{"id": samples[k].id, "value": float(value)} for k, value in zip(mine, values, strict=True)]
    records = gather_records(own, {sample.id: number for number, sample in enumerate(samples)})
    return None if records is None else np.array([record["value"] for record in records])


def _mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    units = {str(k): {"mean": float(value)} for k, value in enumerate(values)}
    return {"mean": float(values.mean()), "interval": intervals(units, dict)["mean"]}


def leakage_markdown(result: dict[str, Any]) -> str:
    """A sweep as one Markdown table, for COCO with the papers' rows, and the threshold of each measure."""
    metric, rows = result["metric"], result["rows"]
    others = list(dict.fromkeys(name for row in rows for name in row["other_tasks"]))
    columns = [
        "model",
        "s",
        *(f"{name} [95%]" for name in others),
        f"task {metric} [95%]",
        "task without text",
        f"{metric} against the wrong prompt",
        "control",
        "excess [95%]",
        "likelihood gain, nats/token [95%]",
    ]
    lines = [
        f"# Leakage by guidance scale ({result['samples']} images, seed {result['seed']})",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        excess, gain = row["excess"], row["likelihood_gain"]
        scores = [row["other_tasks"].get(name) for name in others]
        cells = [
            row["model"],
            f"{row['scale']:g}",
            *("" if found is None else _span(found["score"], found["interval"]) for found in scores),
            _span(row["task"][metric], row["task_interval"]),
            f"{row['no_text_task'][metric]:.2f}",
            f"{row['mismatched'][metric]:.2f}",
            f"{row['control'][metric]:.2f}",
            _span(excess["difference"], excess["interval"], "+.2f"),
            _span(gain["mean"], gain["interval"], "+.3f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for published in published_rows("mismatched captions") if result["benchmark"] == "captions" else ():
        if metric in published.scores:
            before, value = " |" * (len(others) + 3), f"{published.scores[metric]:.2f}"
            lines.append(f"| {published.model} ({published.source}) |{before} {value} | | | |")
    lines.append("")
    for label, found in result["smallest_leaking_scale"].items():
        for measure, scale in found.items():
            text = "above every s of this sweep" if scale is None else f"s = {scale:g}"
            lines.append(f"- {label}, leakage threshold by {measure}: {text}")
    lines += ["", "The threshold is the smallest s at which the 95% interval of the excess or of the gain is above 0."]
    return "\n".join(lines) + "\n"


def _span(value: float, interval: Sequence[float], form: str = ".2f") -> str:
    low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
