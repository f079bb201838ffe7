"""One evaluation from model name to results folder: what `sdllava evaluate` does for each model and benchmark."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .benchmarks import get_benchmark
from .benchmarks.base import Benchmark, Sample, locate
from .diffusion_prompts import diffusion_prompts
from .judge import Judge
from .responder import Responder, load_model
from .results import RunFolder
from .runner import answer_samples, command_line, data_settings, summarise, take, versions


@dataclass(frozen=True)
class EvaluationOptions:
    """Everything but the model, the benchmark and the output folder; see `sdllava evaluate --help`."""

    protocol: str = "default"
    data: str | None = None
    revision: str | None = None
    images: str | None = None
    limit: int | None = None
    diffusion_prompt: str = "question"
    captions: str | None = None
    guidance: tuple[float, ...] | None = None
    seed: int = 0
    batch_size: int = 8
    blind: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model that several benchmarks share."""

    name: str
    revision: str | None
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None):
        """Loads it; the revision recorded is the Hub's commit, or a fingerprint of a local folder's weights."""
        model, processor = load_model(name, revision, dtype, device)
        commit = (
            getattr(model.config, "_commit_hash", None)
            or revision
            or weights_fingerprint(Path(model.name_or_path or name))
        )
        return cls(name, commit, model, processor)


def weights_fingerprint(folder: Path) -> str | None:
    """A short hash of the sizes and last mebibytes of a folder's safetensors files; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return f"weights {digest.hexdigest()[:16]}" if files else None


def load_samples(name: str, options: EvaluationOptions) -> tuple[Benchmark, list[Sample], dict[str, Any]]:
    """A benchmark, its samples after `--limit`, and where the data came from.

    A folder given with --data may hold one folder per benchmark, by name.
    """
    benchmark = get_benchmark(name, options.protocol)
    if options.images:
        benchmark.image_folder = Path(options.images)
        if not benchmark.image_folder.is_dir():
            raise FileNotFoundError(f"--images names {options.images!r}, which is no folder.")
    if not benchmark.hub_id:
        return benchmark, take(benchmark.read(Path()), options.limit), {"id": name, "revision": None}
    data = options.data
    if data and (Path(data) / name).is_dir():
        data = str(Path(data) / name)
    folder, source = locate(data, benchmark.hub_id, options.revision, benchmark.files)
    return benchmark, take(benchmark.read(folder), options.limit), source


def run_name(model: str) -> str:
    """A folder name from a model's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-") or "model"


def read_captions(path: str | None) -> Mapping[str, str] | None:
    """Image name -> caption from a file of pseudo-captions.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds none.
    """
    if path is None:
        return None
    from ..data.prompts import read_pseudo_captions

    if not Path(path).is_file():
        raise FileNotFoundError(f"The caption file {path!r} does not exist.")
    return read_pseudo_captions(path)


def evaluate(
    loaded: LoadedModel,
    name: str,
    output: str | Path,
    options: EvaluationOptions = EvaluationOptions(),
    judge: Judge | None = None,
    progress=None,
) -> dict[str, Any]:
    """Answers a benchmark, writes `samples.jsonl` and `results.json` into `output`, and returns the results.

    A run that was stopped goes on where it stopped. Under `accelerate launch` the samples are shared by the
    processes, and the main one writes the results, which equal those of a single process.

    Raises:
        FileNotFoundError, ValueError, OSError: one sentence; replies so far are kept.
    """
    benchmark, samples, source = load_samples(name, options)
    return evaluate_samples(loaded, benchmark, samples, source, output, options, judge, progress)


def evaluate_samples(
    loaded: LoadedModel,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    source: Mapping[str, Any],
    output: str | Path,
    options: EvaluationOptions = EvaluationOptions(),
    judge: Judge | None = None,
    progress=None,
    questions: dict[str, list[str]] | None = None,
    score: bool = True,
) -> dict[str, Any]:
    """`evaluate` for samples that are read already; `questions` replaces what `options.diffusion_prompt` would ask."""
    if not samples:
        raise ValueError(f"{benchmark.name}: there is no sample to evaluate.")
    responder = Responder(loaded.model, loaded.processor, benchmark.template, options.guidance)
    captions = read_captions(options.captions)
    if not responder.diffusion:
        questions = None
    elif questions is None:
        questions = diffusion_prompts(samples, options.diffusion_prompt, captions, options.seed)
    settings = _settings(loaded, benchmark, samples, source, responder, options, questions)
    runs = [(Path(output), settings)]
    if options.blind:
        runs.append((Path(output) / "blind", {**settings, "blind": True}))
    answered = [_answer(responder, benchmark, samples, *run, questions, options, progress) for run in runs]
    if answered[0] is None:  # not the main process
        return {}
    blind = None
    for (path, identity), records in reversed(list(zip(runs, answered, strict=True))):
        judged = _judge(benchmark, records, path, judge)
        results = {**identity, **(summarise(benchmark, records) if score else {}), "judge": judged}
        results.update(batch_size=options.batch_size, versions=versions(), command=command_line())
        if blind is not None:
            results["blind"] = {key: blind[key] for key in ("scores", "intervals_95", "unparsed")}
            results["notes"]["blind"] = "the same prompts, each image replaced by a mid-grey one of the same size"
        RunFolder(path, identity).finish(records, results)
        blind = results
    return results


def _settings(loaded, benchmark, samples, source, responder, options, questions) -> dict[str, Any]:
    captions = options.captions and hashlib.sha256(Path(options.captions).read_bytes()).hexdigest()[:16]
    asked = None
    if questions is not None:
        asked = {"choice": options.diffusion_prompt, "captions": captions, "seed": options.seed}
        asked["hash"] = hashlib.sha256(repr(sorted(questions.items())).encode()).hexdigest()[:16]
    scales = responder.guidance_scales
    if scales is None and responder.diffusion:
        scales = list(loaded.model.config.diffusion_config.guidance_scales)
    return {
        "benchmark": benchmark.name,
        "protocol": {"name": options.protocol, "description": benchmark.protocols[options.protocol]},
        "model": {"id": loaded.name, "revision": loaded.revision, "class": type(loaded.model).__name__},
        "data": data_settings(dict(source), samples),
        "diffusion_prompt": asked,
        "guidance_scales": scales,
        "prompt": samples[0].prompt,
        "template": {"name": benchmark.template, "example": responder.text(samples[0])},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "generation": benchmark.generation,
        "seed": options.seed,
    }


def _answer(responder, benchmark, samples, path, settings, questions, options, progress) -> list[dict] | None:
    """All records on the main process, None on the others."""
    from accelerate.utils import gather_object

    from .processes import process_state

    state = process_state()
    with state.main_process_first():
        folder = RunFolder(path, settings, state.process_index)
    state.wait_for_everyone()
    records = answer_samples(
        responder,
        benchmark,
        samples,
        folder,
        questions,
        options.batch_size,
        settings.get("blind", False),
        options.seed,
        state.num_processes,
        progress if state.is_main_process else None,
    )
    if state.num_processes > 1:
        records = gather_object(records)
        if not state.is_main_process:
            return None
    order = {sample.id: number for number, sample in enumerate(samples)}
    return sorted(records, key=lambda record: order[record["id"]])


def _judge(benchmark: Benchmark, records: list[dict], path: Path, judge: Judge | None) -> str | None:
    """Has every reply judged that the protocol wants judged, keeping judgments as they come; the judge's name."""
    wanted = [record for record in records if benchmark.judge_prompt(record) is not None]
    if not wanted:
        return None
    if judge is None:
        benchmark.notes["judge"] = f"absent: {len(wanted)} replies are written and not judged (name one with --judge)"
        return None
    benchmark.notes.pop("judge", None)
    kept = RunFolder(path / f"judgments-{run_name(judge.name)}", {"judge": judge.name})
    done = {record["id"]: record["judgment"] for record in kept.finished()}
    for record in wanted:
        if record["id"] not in done:
            done[record["id"]] = judge(*benchmark.judge_prompt(record))
            kept.append([{"id": record["id"], "judgment": done[record["id"]]}])
        record["judgment"] = done[record["id"]]
        benchmark.apply_judgment(record, record["judgment"])
    return judge.name
