"""Runs a model over a benchmark: batches by length, replies saved as they arrive, scores at the end.

Replies do not depend on batch size, on the order of batches, on resuming, or on the number of processes: rows are
left-padded, decoding is greedy, and a protocol that samples runs every sample as its own batch, with its own seed.
"""

import itertools
import random
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from .benchmarks.base import Benchmark, Sample, fingerprint, unit_means
from .bootstrap import intervals
from .identity import IMAGES, check_images, image_fingerprints
from .responder import Responder
from .results import RunFolder

T = TypeVar("T")
U = TypeVar("U")
Progress = Callable[[int, int], object]
"""Called with the number of finished samples and their total."""
Questions = Mapping[str, list[str]]
"""Sample id -> the diffusion model's prompts, one per image."""


def take(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """About `limit` samples, spread evenly over the benchmark. Pairs and groups stay complete.

    Raises:
        ValueError: `limit` is less than 1.
    """
    if limit is None or limit >= len(samples):
        return list(samples)
    if limit < 1:
        raise ValueError(f"--limit {limit} is too small. Use at least 1.")
    units: dict[str, list[Sample]] = {}
    for sample in samples:
        units.setdefault(str(sample.info.get("pair", sample.info.get("group", f"id {sample.id}"))), []).append(sample)
    groups = list(units.values())
    wanted = max(1, round(limit * len(groups) / len(samples)))
    edges = [k * len(groups) // wanted for k in range(wanted + 1)]
    generator = random.Random(0)  # a jittered grid, because an even stride could coincide with the patterns
    chosen = [generator.randrange(low, high) for low, high in itertools.pairwise(edges)]
    return [sample for index in chosen for sample in groups[index]]


def answer_samples(
    responder: Responder,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    folder: RunFolder,
    questions: Questions | None = None,
    batch_size: int = 8,
    blind: bool = False,
    seed: int = 0,
    processes: int = 1,
    progress: Progress | None = None,
) -> list[dict]:
    """Answer this process's share of the samples, and return its records in the benchmark's order.

    Args:
        responder: The model.
        benchmark: The benchmark.
        samples: All samples.
        folder: Folder of the run, with the replies that are already there.
        questions: The diffusion model's prompts.
        batch_size: Samples per batch.
        blind: Whether images are replaced by grey ones.
        seed: Seed of protocols that sample.
        processes: The number of processes that share the samples. `folder.rank` is the index of this one.
        progress: Called with the number of answered samples and their total.

    Raises:
        FileNotFoundError, ValueError: An image is missing, cannot be read, or is not that of a kept reply. Earlier
            replies are kept.
    """
    mine = [sample for number, sample in enumerate(samples) if number % processes == folder.rank]
    done = {record["id"]: record for record in folder.finished()}
    images = image_fingerprints(samples)
    check_images(done.values(), images, folder.path)
    todo = [sample for sample in mine if sample.id not in done]
    todo.sort(key=_batching_order(todo))
    sampled = benchmark.generation.get("do_sample", False)
    size = 1 if sampled else batch_size
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]

    def prompts(batch: list[Sample]) -> list[list[str]] | None:
        return [questions[sample.id] for sample in batch] if questions else None

    def record_of(sample: Sample, reply: str) -> dict[str, Any]:
        return {**make_record(benchmark, sample, reply, questions), IMAGES: images[sample.id]}

    answered = len(mine) - len(todo)
    ahead = one_ahead(lambda batch: responder.prepare(batch, prompts(batch), blind), batches)
    for batch in batches:
        if sampled:
            torch.manual_seed(zlib.crc32(f"{seed} {batch[0].id}".encode()))
        try:
            replies = responder.reply(batch, benchmark.generation, prompts(batch), blind, next(ahead))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(
                f"In the batch of the samples {', '.join(repr(sample.id) for sample in batch)}: {error} The first "
                f"{len(done)} replies are kept in {str(folder.path)!r}. If images are missing or damaged, complete "
                "them and run the same command again. Changed questions need another --output."
            ) from error
        records = [record_of(sample, reply) for sample, reply in zip(batch, replies, strict=True)]
        folder.append(records)
        done.update({record["id"]: record for record in records})
        answered += len(batch)
        if progress:
            progress(answered, len(mine))
    # parsed again, so that a judgement of an earlier run does not replace the parser's verdict
    return [record_of(sample, done[sample.id]["reply"]) for sample in mine]


def one_ahead(function: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """`function` of each item, in order. A thread computes the next one while the caller uses the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = [pool.submit(function, item) for item in items[:1]]
        for item in items[1:]:
            following.append(pool.submit(function, item))
            yield following.pop(0).result()
        for last in following:
            yield last.result()


def _batching_order(samples: Sequence[Sample]) -> Callable[[Sample], tuple]:
    """Sort key by length that keeps the questions on one image together, so that they share its encoding."""
    longest: dict[tuple, int] = {}
    for sample in samples:
        longest[sample.image_ids] = max(len(sample.prompt), longest.get(sample.image_ids, 0))
    return lambda s: (len(s.images), longest[s.image_ids], s.image_ids, len(s.prompt), s.id)


def make_record(benchmark: Benchmark, sample: Sample, reply: str, questions: Questions | None) -> dict[str, Any]:
    """One line of `samples.jsonl`: prompt, reply, parsed answer and verdict, and what the scoring needs."""
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


def summarise(benchmark: Benchmark, records: Sequence[dict]) -> dict[str, Any]:
    """Scores in percent with their intervals, the chance level, and the number of replies without an answer."""
    units = benchmark.units(records) if records else {}
    empty = sum(not record["reply"] for record in records)
    chance = benchmark.chance(records) if records else {}  # may add to the notes
    notes = dict(benchmark.notes)
    if empty:
        notes["empty replies"] = f"{empty} of {len(records)} replies empty, counted as wrong"
    if not units:
        notes["score"] = "absent: the run has no complete unit (pair, group or rated reply)"
    return {
        "metric": benchmark.metric,
        "scores": benchmark.scores(unit_means(units)) if units else {},
        "intervals_95": intervals(units, benchmark.scores) if units else {},
        "chance": chance,
        "samples": len(records),
        "units": len(units),
        "unparsed": sum(record["parsed"] is None for record in records),
        "empty_replies": empty,
        "notes": notes,
    }


def command_line() -> str:
    """The command of this process, quoted for a shell."""
    called = Path(sys.argv[0])
    program = ["python", "-m", called.parent.name] if called.name == "__main__.py" else [called.name]
    return shlex.join([*program, *sys.argv[1:]])


def data_settings(source: Mapping[str, Any], samples: Sequence[Sample]) -> dict[str, Any]:
    """The identity of the data: its source, and the fingerprint and number of the samples."""
    return {**source, "fingerprint": fingerprint(samples), "samples": len(samples)}
