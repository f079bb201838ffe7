"""Runs a model over a benchmark: batches by length, replies kept as they come, scores at the end.

Replies do not depend on batch size, on the order of batches, on resuming, or on the number of processes: rows are
left-padded, decoding is greedy, and where a protocol samples, every sample is drawn alone from its own seed.
"""

import itertools
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .benchmarks.base import Benchmark, Sample, fingerprint, unit_means
from .bootstrap import intervals
from .responder import Responder
from .results import RunFolder

Progress = Callable[[int, int], None]


def take(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most about `limit` samples, spread evenly over the benchmark, pairs and groups kept whole."""
    if limit is None or limit >= len(samples):
        return list(samples)
    if limit < 1:
        raise ValueError(f"--limit is a number of samples, at least 1, not {limit}.")
    units: dict[str, list[Sample]] = {}
    for sample in samples:
        units.setdefault(str(sample.info.get("pair", sample.info.get("group", f"id {sample.id}"))), []).append(sample)
    groups = list(units.values())
    wanted = max(1, round(limit * len(groups) / len(samples)))
    edges = [k * len(groups) // wanted for k in range(wanted + 1)]
    generator = random.Random(0)  # a jittered grid: an even stride could fall in step with the patterns
    chosen = [generator.randrange(low, high) for low, high in itertools.pairwise(edges)]
    return [sample for index in chosen for sample in groups[index]]


def answer_samples(
    responder: Responder,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    folder: RunFolder,
    questions: dict[str, list[str]] | None = None,
    batch_size: int = 8,
    blind: bool = False,
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> list[dict]:
    """The records of this process's share of the samples, in the benchmark's order.

    Args:
        questions: sample id -> the diffusion model's prompts, one per image.
        processes: how many processes share the samples; `folder.rank` says which one this is.

    Raises:
        FileNotFoundError, ValueError: an image is missing or cannot be read; replies before it are kept.
    """
    mine = [sample for number, sample in enumerate(samples) if number % processes == folder.rank]
    done = {record["id"]: record for record in folder.finished()}
    todo = [sample for sample in mine if sample.id not in done]
    todo.sort(key=_batching_order(todo))
    sampled = benchmark.generation.get("do_sample", False)
    size = 1 if sampled else batch_size
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]

    def prompts(batch: list[Sample]) -> list[list[str]] | None:
        return [questions[sample.id] for sample in batch] if questions else None

    answered = len(mine) - len(todo)
    ahead = one_ahead(lambda batch: responder.prepare(batch, prompts(batch), blind), batches)
    for batch in batches:
        if sampled:
            _seed_everything(zlib.crc32(f"{seed} {batch[0].id}".encode()))
        try:
            replies = responder.reply(batch, benchmark.generation, prompts(batch), blind, next(ahead))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(
                f"{error} The {len(done)} replies so far are kept in {folder.path}: put it right and go on with the "
                "same command."
            ) from error
        records = [
            make_record(benchmark, sample, reply, questions) for sample, reply in zip(batch, replies, strict=True)
        ]
        folder.append(records)
        done.update({record["id"]: record for record in records})
        answered += len(batch)
        if progress:
            progress(answered, len(mine))
    # parsed anew, so that what a judge once said of a reply is not taken for the parser's verdict
    return [make_record(benchmark, sample, done[sample.id]["reply"], questions) for sample in mine]


def one_ahead(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, in order; a thread works on the next one while the caller uses the last."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = [pool.submit(function, item) for item in items[:1]]
        for item in items[1:]:
            following.append(pool.submit(function, item))
            yield following.pop(0).result()
        for last in following:
            yield last.result()


def _batching_order(samples: Sequence[Sample]) -> Callable[[Sample], tuple]:
    """By length, with the questions on one image side by side, so that its encoding serves them all."""
    longest: dict[tuple, int] = {}
    for sample in samples:
        longest[sample.image_ids] = max(len(sample.prompt), longest.get(sample.image_ids, 0))
    return lambda s: (len(s.images), longest[s.image_ids], s.image_ids, len(s.prompt), s.id)


def make_record(benchmark: Benchmark, sample: Sample, reply: str, questions: dict[str, list[str]] | None) -> dict:
    parsed = benchmark.parse(sample, reply)
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "diffusion_prompts": questions[sample.id] if questions else None,
        "reply": reply,
        "parsed": parsed,
        "target": sample.target,
        "correct": benchmark.is_correct(sample, parsed),
        **sample.info,
    }


def _seed_everything(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def summarise(benchmark: Benchmark, records: Sequence[dict]) -> dict[str, Any]:
    """Scores in percent with their intervals, chance, and how many replies gave no answer."""
    units = benchmark.units(records) if records else {}
    empty = sum(not record["reply"] for record in records)
    summary = {
        "metric": benchmark.metric,
        "scores": benchmark.scores(unit_means(units)) if units else {},
        "intervals_95": intervals(units, benchmark.scores) if units else {},
        "chance": benchmark.chance(records) if records else {},
        "samples": len(records),
        "units": len(units),
        "unparsed": sum(record["parsed"] is None for record in records),
        "empty_replies": empty,
        "notes": dict(benchmark.notes),
    }
    if empty:
        summary["notes"]["empty replies"] = f"{empty} replies are empty and count as wrong"
    if not units:
        summary["notes"]["score"] = "absent: no complete unit (pair, group or rated reply) to score"
    return summary


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("sdllava", "torch", "transformers", "diffusers", "tokenizers", "datasets", "accelerate", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    import shlex

    called = Path(sys.argv[0])
    program = ["python", "-m", called.parent.name] if called.name == "__main__.py" else [called.name]
    return shlex.join([*program, *sys.argv[1:]])


def data_settings(source: dict[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    return {**source, "fingerprint": fingerprint(samples), "samples": len(samples)}
