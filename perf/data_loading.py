"""Training data at full scale: the memory of several ranks against one, and the time to the first step.

Generates a data file in LLaVA's format and reads it as `sdllava train` does. Memory is Linux's proportional set size
(PSS): a page that n processes map counts 1/n in each, so the sum over the processes is what they occupy together.
"data" is its growth from the end of the imports until every rank has read every row.

    python perf/data_loading.py                             # 200,000 records
    python perf/data_loading.py --records 2000 --ranks 2 --no-first-step
"""

import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sdllava.atomic_files import write_json

WORDS = ("left", "right", "red", "blue", "cup", "table", "on", "under", "what", "is", "colour", "how", "many", "there")
IMAGES = 16
"""Different image files. Their pixels are not part of the measured memory."""
BATCH = 16
TURNS, WORDS_PER_TURN = 3, 35
"""Of each conversation: about the size of a sample of LLaVA-Mix-665k."""


def write_records(folder: Path, count: int) -> Path:
    """A data file of random conversations, and its images."""
    import PIL.Image

    draw = random.Random(0)
    for number in range(IMAGES):
        PIL.Image.new("RGB", (64, 64), (number * 16, 90, 160)).save(folder / f"{number}.png")
    path = folder / "records.json"
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(count):
            texts = [" ".join(draw.choices(WORDS, k=WORDS_PER_TURN)) for _ in range(2 * TURNS)]
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            turns[0]["value"] = f"<image>\n{texts[0]}"
            record = {"id": number, "image": f"{number % IMAGES}.png", "conversations": turns}
            stream.write(("[" if number == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    return path


def proportional_bytes() -> int:
    """This process's proportional set size."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def read_all(path: Path, seed: int, barrier: Any, results: Any) -> None:
    """One rank: read every row once, in its own order. Puts the memory before and after, and the seconds."""
    from sdllava.data.sources import DataSource, load_data

    small = path.with_name("small.json")
    next(iter(load_data([DataSource(str(small))])))  # imports what reading imports
    barrier.wait()
    before, start = proportional_bytes(), time.perf_counter()
    barrier.wait()
    data = load_data([DataSource(str(path))])
    loaded = time.perf_counter()
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    for position in range(0, len(order), BATCH):
        data[order[position : position + BATCH]]  # as torch's data loader reads
    read = time.perf_counter()
    barrier.wait()
    results.put((before, proportional_bytes(), loaded - start, read - loaded))
    barrier.wait()


def measure_ranks(path: Path, ranks: int) -> dict[str, Any]:
    """Memory and times of several ranks at once."""
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(ranks), spawn.Queue()
    processes = [spawn.Process(target=read_all, args=(path, seed, barrier, results)) for seed in range(ranks)]
    for process in processes:
        process.start()
    rows = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        "ranks": ranks,
        "data_bytes": sum(after - before for before, after, _, _ in rows),
        "all_bytes": sum(after for _, after, _, _ in rows),
        "load_seconds": max(row[2] for row in rows),
        "read_seconds": max(row[3] for row in rows),
    }


def time_first_step(path: Path, results: Any) -> None:
    """Seconds of the parts of `sdllava train` up to the end of the first step, on the miniature."""
    marks = [("start", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    from transformers import TrainerCallback

    from sdllava.train import run as training

    class FirstStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mark("first step")

    mark("imports")
    flags = f"--init_from mini --train_data {path} --image_folder {path.parent} --output_dir {path.parent / 'run'} "
    flags += "--max_steps 1 --max_length 2048 --per_device_train_batch_size 2 "
    flags += "--save_strategy no --bf16 false --disable_tqdm true"
    training.register()
    run = training.parse_run(flags.split())
    source = training.read_source(run.model)
    collator = training.build_collator(run, training.build_processor(source))
    mark("arguments and processor")
    data = training.load_sources(run, run.data.datasets)
    mark("data")
    training.require_image_files(run, collator, data, run.data.datasets)
    training.require_supervision(training.in_batches(data), collator)
    mark("checks of the data")
    trainer = training.build_trainer(run, source, collator, data)
    mark("model and trainer")
    trainer.add_callback(FirstStep())
    trainer.train()
    results.put({name: end - begin for (_, begin), (name, end) in itertools.pairwise(marks)})


def in_own_process(target: Any, *arguments: Any) -> Any:
    """What a function puts into its last argument, a queue, in a new process."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=target, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main(
    records: Annotated[int, typer.Option(min=1, help="Generated records.")] = 200_000,
    ranks: Annotated[int, typer.Option(min=2, help="Processes to compare with one.")] = 4,
    first_step: Annotated[bool, typer.Option(help="Also time the first training step.")] = True,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(__file__).parent / "results" / "data_loading.json",
) -> None:
    """Measure the memory of the ranks and the time to the first step."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # of the processes that start from here
        path = write_records(Path(folder), records)
        path.with_name("small.json").write_text(path.read_text(encoding="utf-8").partition(",\n")[0] + "]")
        found: dict[str, Any] = {"records": records, "file_bytes": path.stat().st_size}
        if first_step:
            found["first_step"] = {name: in_own_process(time_first_step, path) for name in ("new", "cached")}
        found["one"], found["several"] = measure_ranks(path, 1), measure_ranks(path, ranks)
    for name, seconds in found.get("first_step", {}).items():
        parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
        print(f"first step, {name} data: {sum(seconds.values()):.1f} s ({parts})")
    for row in (found["one"], found["several"]):
        print(
            f"{row['ranks']} rank(s): data {row['data_bytes'] / 2**20:.0f} MiB, everything "
            f"{row['all_bytes'] / 2**20:.0f} MiB, loaded in {row['load_seconds']:.1f} s, read in "
            f"{row['read_seconds']:.1f} s"
        )
    found["ratio"] = found["several"]["data_bytes"] / found["one"]["data_bytes"]
    print(
        f"Data of {ranks} ranks: {found['ratio']:.2f} times that of one; file of {found['file_bytes'] / 2**20:.0f} MiB"
    )
    write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
