"""One evaluation, from model name to results folder, as `sdllava evaluate` runs it for each model and benchmark."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.prompts import read_pseudo_captions
from ..fingerprints import weights_hash
from ..run_records import locked
from ..version import installed_versions
from .benchmarks import get_benchmark
from .benchmarks.base import Benchmark, Sample, locate
from .judge import Judge
from .processes import gather_records, process_state
from .prompt_choices import prompts_for_samples
from .responder import Responder, load_model
from .results import RunFolder
from .runner import Progress, Questions, answer_samples, command_line, data_settings, summarise, take


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of an evaluation except model, benchmark and output folder; see `sdllava evaluate --help`.

    Attributes:
        protocol: A key of the benchmark's `protocols`.
        data: Local folder in the published layout, or a Hub data set id. None uses the published id.
        revision: Branch, tag or commit of the data on the Hub.
        images: Folder of the images, if the annotations come without them.
        limit: Approximate number of samples, spread evenly. None uses all.
        diffusion_prompt: One of `prompt_choices.CHOICES`.
        captions: File of pseudo-captions.
        guidance: Guidance scales that replace the checkpoint's.
        seed: Seed of sampling and of derangements.
        batch_size: Samples per batch. Results do not depend on it.
        blind: Also runs with grey images.
    """

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


DEFAULT_OPTIONS = EvaluationOptions()


@dataclass(frozen=True)
class LoadedModel:
    """A model and its processor, shared by several benchmarks.

    Attributes:
        name: Folder or Hub id, as given.
        revision: The Hub's commit, or "weights" and the start of the hash of a local model's weights.
        model: Any image-text-to-text model of transformers.
        processor: Its processor.
    """

    name: str
    revision: str | None
    model: Any
    processor: Any

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None
    ) -> "LoadedModel":
        """Load a model; see `load_model` for the arguments."""
        model, processor = load_model(name, revision, dtype, device)
        commit = getattr(model.config, "_commit_hash", None) or f"weights {weights_hash(model)[:16]}"
        return cls(name, commit, model, processor)


def load_samples(name: str, options: EvaluationOptions) -> tuple[Benchmark, list[Sample], dict[str, Any]]:
    """A benchmark, its samples after `--limit`, and the source of its data.

    A folder given with `--data` may contain one folder per benchmark, by name.

    Raises:
        FileNotFoundError: The data or the folder of images does not exist.
        ValueError: The benchmark or the protocol does not exist, or the data is not as published.
    """
    benchmark = get_benchmark(name, options.protocol)
    if options.images:
        benchmark.image_folder = Path(options.images)
        if not benchmark.image_folder.is_dir():
            raise FileNotFoundError(f"{options.images!r} is not a folder. Correct --images.")
    if benchmark.data_file:
        if not options.data or not Path(options.data).is_file():
            raise FileNotFoundError(f"--data {options.data!r} is not a file. Benchmark {name!r} reads a .jsonl file.")
        source = {"id": options.data, "revision": None}
        return benchmark, take(benchmark.read(Path(options.data)), options.limit), source
    data = options.data
    if data and (Path(data) / name).is_dir():
        data = str(Path(data) / name)
    if not benchmark.hub_id:
        folder = Path(data) if data else benchmark.default_folder()
        return benchmark, take(benchmark.read(folder), options.limit), {"id": name, "revision": None}
    folder, source = locate(data, benchmark.hub_id, options.revision, benchmark.files)
    return benchmark, take(benchmark.read(folder), options.limit), source


def run_name(model: str) -> str:
    """The name of a run's folder, made from a model's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-") or "model"


def read_captions(path: str | None) -> Mapping[str, str] | None:
    """Image name -> caption from a file of pseudo-captions, None without a file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file contains no captions.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"The caption file {path!r} does not exist. Correct --captions.")
    return read_pseudo_captions(path)


def evaluate(
    loaded: LoadedModel,
    name: str,
    output: str | Path,
    options: EvaluationOptions = DEFAULT_OPTIONS,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer a benchmark and write `samples.jsonl` and `results.json`.

    Resumes a stopped run. Under `accelerate launch` the processes share the samples and the main one writes the
    results, which equal those of a single process.

    Args:
        loaded: The model.
        name: Name of the benchmark.
        output: Folder of the run.
        options: All other options.
        judge: For protocols that need one. Without it their scores are absent.
        progress: Called with the number of answered samples and their total.

    Returns:
        `dict`: The contents of `results.json`, empty on other processes than the main one.

    Raises:
        FileNotFoundError, ValueError, OSError: Something is missing, invalid or not writable. Replies are kept.
    """
    benchmark, samples, source = load_samples(name, options)
    return evaluate_samples(loaded, benchmark, samples, source, output, options, judge, progress)


def evaluate_samples(
    loaded: LoadedModel,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    source: Mapping[str, Any],
    output: str | Path,
    options: EvaluationOptions = DEFAULT_OPTIONS,
    judge: Judge | None = None,
    progress: Progress | None = None,
    questions: Questions | None = None,
    score: bool = True,
) -> dict[str, Any]:
    """`evaluate` for samples that are already read.

    Args:
        loaded: The model.
        benchmark: The benchmark.
        samples: Its samples.
        source: `{"id", "revision"}` of the data.
        output: Folder of the run.
        options: All other options.
        judge: For protocols that need one.
        progress: Called with the number of answered samples and their total.
        questions: The diffusion model's prompts, in place of those that `options.diffusion_prompt` selects.
        score: Whether to compute scores.

    Returns:
        `dict`: The contents of `results.json`, empty on other processes than the main one.

    Raises:
        BlockingIOError: Another process evaluates to `output`.
        ValueError: `samples` is empty, or an option is invalid.
    """
    if not samples:
        raise ValueError(f"{benchmark.name}: there are no samples to evaluate. Check --data.")
    responder = Responder(loaded.model, loaded.processor, benchmark.template, options.guidance)
    captions = read_captions(options.captions)
    if not responder.diffusion:
        questions = None
    elif questions is None:
        questions = prompts_for_samples(samples, options.diffusion_prompt, captions, options.seed)
    settings = _settings(loaded, benchmark, samples, source, responder, options, questions)
    runs = [(Path(output), settings)]
    if options.blind:
        runs.append((Path(output) / "blind", {**settings, "blind": True}))
    with locked(output, process_state().process_index):
        answered = [_answer(responder, benchmark, samples, *run, questions, options, progress) for run in runs]
        results: dict[str, Any] = {}
        blind = None
        for (path, identity), records in reversed(list(zip(runs, answered, strict=True))):
            if records is None:  # not the main process
                return {}
            judged = _judge(benchmark, records, path, judge)
            results = {**identity, **(summarise(benchmark, records) if score else {}), "judge": judged}
            results.update(batch_size=options.batch_size, versions=installed_versions(), command=command_line())
            results["tower"] = _tower_facts(loaded)
            if blind is not None:
                results["blind"] = {key: blind[key] for key in ("scores", "intervals_95", "unparsed")}
                results["notes"]["blind"] = "the same prompts, each image replaced by a mid-grey one of the same size"
            RunFolder(path, identity).finish(records, results)
            blind = results
    return results


def _tower_facts(loaded: LoadedModel) -> dict[str, list] | None:
    """Where and at which noise levels the diffusion model is read, None without one."""
    config = getattr(loaded.model.config, "diffusion_config", None)
    return None if config is None else {"taps": list(config.taps), "timesteps": list(config.timesteps)}


def _settings(
    loaded: LoadedModel,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    source: Mapping[str, Any],
    responder: Responder,
    options: EvaluationOptions,
    questions: Questions | None,
) -> dict[str, Any]:
    captions = options.captions and hashlib.sha256(Path(options.captions).read_bytes()).hexdigest()[:16]
    prompts = None
    if questions is not None:
        prompts = {
            "choice": options.diffusion_prompt,
            "captions": captions,
            "seed": options.seed,
            "hash": hashlib.sha256(repr(sorted(questions.items())).encode()).hexdigest()[:16],
        }
    scales = responder.guidance_scales
    if scales is None and responder.diffusion:
        scales = list(loaded.model.config.diffusion_config.guidance_scales)
    return {
        "benchmark": benchmark.name,
        "protocol": {"name": options.protocol, "description": benchmark.protocols[options.protocol]},
        "model": {"id": loaded.name, "revision": loaded.revision, "class": type(loaded.model).__name__},
        "data": data_settings(source, samples),
        "diffusion_prompt": prompts,
        "guidance_scales": scales,
        "prompt": samples[0].prompt,
        "template": {"name": benchmark.template, "example": responder.text(samples[0])},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "generation": benchmark.generation,
        "seed": options.seed,
    }


def _answer(
    responder: Responder,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    path: Path,
    settings: dict[str, Any],
    questions: Questions | None,
    options: EvaluationOptions,
    progress: Progress | None,
) -> list[dict] | None:
    """All records on the main process, None on the others."""
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
    return gather_records(records, {sample.id: number for number, sample in enumerate(samples)})


def _judge(benchmark: Benchmark, records: list[dict], path: Path, judge: Judge | None) -> str | None:
    """Judge the replies that the protocol requires, resuming from saved judgements. Returns the judge's name."""
    wanted = [(record, prompt) for record in records if (prompt := benchmark.judge_prompt(record)) is not None]
    if not wanted:
        return None
    if judge is None:
        benchmark.notes["judge"] = f"absent: {len(wanted)} replies are written and not judged (name one with --judge)"
        return None
    benchmark.notes.pop("judge", None)
    judge = judge.with_temperature(benchmark.judge_temperature)
    kept = RunFolder(path / f"judgments-{run_name(judge.name)}", {"judge": judge.name})
    done = {record["id"]: record for record in kept.finished()}
    for record, (system, user) in wanted:
        if record["id"] not in done:
            reply = judge(system, user)
            done[record["id"]] = {"id": record["id"], "judgment": reply, "temperature": judge.temperature}
            kept.append([done[record["id"]]])
        record["judgment"] = done[record["id"]]["judgment"]
        benchmark.apply_judgment(record, record["judgment"])
    # judgements of earlier versions have no temperature, and were made at the one in the judge's name
    if unset := sum(done[record["id"]].get("temperature", 0) is None for record, _ in wanted):
        benchmark.notes["judge"] = f"{unset} judgements at the endpoint's own temperature, because it accepts no other"
    return judge.name
