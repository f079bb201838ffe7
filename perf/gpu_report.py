"""A report of what this project can only measure on a GPU, within nine minutes, as one Markdown page.

Each section is a performance script, or the tests marked `gpu`, in a process of its own with a time limit. A section
that fails is reported and does not stop the others. The page is complete after every section, so a stopped report
keeps what it has.

    python perf/gpu_report.py gpu-report.md                           # a machine with one GPU: make gpu-report
    python perf/gpu_report.py report.md --size mini --device cpu      # a dry run without a GPU
"""

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that this process stays without CUDA, and can fork

import importlib
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import answering  # noqa: F401 - the sections' scripts and libraries, imported once for all processes
import attention_kernels  # noqa: F401 - as above
import features
import follow_up
import memory  # noqa: F401 - as above
import torch
import training  # noqa: F401 - as above
import typer
from measure import Device, Size, describe_machine

from sdllava.atomic_files import write_text

TESTS = Path(__file__).parents[1] / "tests"
LINES = 25
"""Of the output of a section without a table, and of one that fails."""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading.
        module: The script in this folder whose `main` it calls, or `pytest`.
        limit: Seconds after which its process is ended, except in a dry run.
        arguments: Of `main` on a GPU.
        small: Arguments of the dry run that differ.
    """

    title: str
    module: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)


ONCE = {"repeats": 1}
SECTIONS = {
    "tests": Section("GPU tests", "pytest", 90),
    "answering": Section(
        "First token and decoding, Vicuna-7B's size", "answering", 120,
        {"batch": [1, 8], "new_tokens": 32, "repeats": 2}, {"batch": [1], "new_tokens": 2, **ONCE},
    ),
    "follow-up": Section(
        "Follow-up questions that reuse the prefix, Vicuna-7B's size", "follow_up", 60,
        {"language_model": follow_up.RANDOM, "repeats": 3}, ONCE,
    ),
    "training": Section(
        "Training, samples per second and peak memory", "training", 120,
        {"batch": 8, "steps": 2, "repeats": 2}, {"batch": 1, "steps": 1, **ONCE},
    ),
    "memory": Section("Memory of an answer", "memory", 60, {"measure": True}, {"measure": False}),
    "kernels": Section("Attention kernels", "attention_kernels", 60, {"batch": [1, 8]}, {"batch": [1], **ONCE}),
    "compiled": Section(
        "compile_pass, with CUDA graphs", "features", 150,
        {"part": [features.Part.compiled], "batch": [1], "repeats": 5}, {"compile_backend": "eager", **ONCE},
    ),
    "features": Section(
        "Features, ours and stock diffusers", "features", 90,
        {"part": [features.Part.guided, features.Part.question], "batch": [1, 8, 32], "repeats": 3},
        {"batch": [1], **ONCE},
    ),
}  # fmt: skip
"""In the order of their importance: the last ones are left out where the time is over."""


@dataclass
class Result:
    """What became of a section: `ok`, or why not. `log` is its output, `found` its JSON."""

    section: Section
    command: str
    outcome: str
    seconds: float = 0.0
    log: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def command_line(section: Section, arguments: dict[str, Any]) -> list[str]:
    """The command that a section is, after `python`."""
    if section.module == "pytest":
        return ["-m", "pytest", *arguments["args"]]
    words = [f"perf/{section.module}.py"]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if name == "language_model":
                words.append(str(one))
            elif isinstance(one, bool):
                words += [option] if one else []
            else:
                words += [option, str(one)]
    return words


def section_arguments(section: Section, size: str, device: str, dtype: str, output: Path) -> dict[str, Any]:
    """The arguments of a section's `main`."""
    if section.module == "pytest":
        files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]
        return {"args": ["-q", "-p", "no:cacheprovider", "-m", "gpu", *files]}
    own = {**section.arguments, **(section.small if size == "mini" else {})}
    return {**own, "size": size, "device": device, "dtype": dtype, "output": output}


def call(section: Section, arguments: dict[str, Any], log: Path) -> None:
    """Run a section in this process, which ends with its status. Its output goes to a file."""
    sys.stdout = sys.stderr = stream = open(log, "a", buffering=1)  # noqa: SIM115 - until the process ends
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.argv = command_line(section, arguments)
    try:
        if section.module == "pytest":
            sys.exit(int(importlib.import_module("pytest").main(arguments["args"])))
        importlib.import_module(section.module).main(**arguments)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        stream.flush()


def use_cuda(device: str) -> None:
    """Allocate a number on the device."""
    torch.zeros(1, device=device)


def start_method(device: str) -> str:
    """How processes start: forked, with all libraries imported, where CUDA works in forked processes."""
    if device == "cpu":
        return "fork"
    probe = multiprocessing.get_context("fork").Process(target=use_cuda, args=(device,))
    probe.start()
    probe.join()
    return "fork" if probe.exitcode == 0 else "spawn"


def run(target: Callable[..., None], arguments: Sequence[Any], method: str, limit: float) -> str:
    """Run a function in a process of its own.

    Returns:
        `str`: `ok`, or why not.
    """
    process: Any = multiprocessing.get_context(method).Process(target=target, args=tuple(arguments))  # type: ignore[attr-defined]  # contexts of any method have it
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"stopped after {limit:.0f} s"
    return "ok" if process.exitcode == 0 else f"failed (exit status {process.exitcode})"


def describe(result: Result) -> str:
    """A section of the page."""
    lines = [f"## {result.section.title}", "", f"`{result.command}`: {result.outcome}, {result.seconds:.0f} s", ""]
    rows = result.found.get("rows", [])
    if rows:
        medians = {row["name"]: row["median"] for row in rows}
        lines += [
            f"| | {result.found['clock']} | ratio | GFLOP | of peak | peak GiB | |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            ratio = medians.get(row["reference"], row["median"]) / row["median"]
            share = row["gflop"] / row["median"] / result.found["matrix_peak_gflops"]
            held = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
            lines.append(
                f"| {row['name']} | {row['median']:.4g} | {ratio:.2f} | {row['gflop']:.4g} | {share:.0%} | {held} | "
                f"{row['note']} |"
            )
        lines += ["", f"Matrix peak: {result.found['matrix_peak_gflops']:.0f} GFLOP/s."]
        lines += [f"- {remark}" for remark in result.found.get("remarks", [])]
    if not rows or result.outcome != "ok":
        lines += ["```", *result.log.splitlines()[-LINES:], "```"]
    return "\n".join([*lines, ""])


def page(results: list[Result], machine: str, size: str, dtype: str, begin: float) -> str:
    """The whole report."""
    lines = [
        "# GPU report",
        "",
        f"{machine}. Size {size}, {dtype}, random weights. {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, "
        f"{time.monotonic() - begin:.0f} s.",
        "",
        "| section | outcome | s |",
        "|---|---|---|",
        *(f"| {result.section.title} | {result.outcome} | {result.seconds:.0f} |" for result in results),
        "",
    ]
    return "\n".join([*lines, *map(describe, results)])


def describe_device(device: str, place: Path) -> None:
    """Write the description of a device to a file: the process that forks may not use CUDA."""
    place.write_text(describe_machine(torch.device(device)))


def main(
    output: Annotated[Path, typer.Argument(help="The Markdown page.")] = Path("gpu-report.md"),
    section: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(SECTIONS)}.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Sections begin and end within this time.")] = 9.0,
    size: Size = "full",
    device: Device = "cuda",
) -> None:
    """Run all sections and write the page."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("No GPU was found. A dry run on the CPU: --size mini --device cpu")
    if unknown := [name for name in section or () if name not in SECTIONS]:
        raise SystemExit(f"--section {unknown[0]!r} does not exist. Use {', '.join(SECTIONS)}.")
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    begin, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder, method = Path(name), start_method(device)
        run(describe_device, (device, folder / "machine"), method, 60)
        machine = (folder / "machine").read_text()
        for key, chosen in SECTIONS.items():
            if section and key not in section:
                continue
            start, log, found = time.monotonic(), folder / f"{key}.log", folder / f"{key}.json"
            arguments = section_arguments(chosen, size, device, dtype, found)
            shown = {name: value for name, value in arguments.items() if name != "output"}
            result = Result(chosen, shlex.join(["python", *command_line(chosen, shown)]), "not run: no time left")
            left = begin + 60 * minutes - start
            if size == "full":
                left = min(left, chosen.limit)
            if left > 0:
                print(f"{chosen.title} ...", flush=True)
                result.outcome = run(call, (chosen, arguments, log), method, left)
                result.seconds = time.monotonic() - start
                result.log = log.read_text(errors="replace") if log.is_file() else ""
                result.found = json.loads(found.read_text()) if found.is_file() else {}
                print(f"  {result.outcome}, {result.seconds:.0f} s", flush=True)
            results.append(result)
            write_text(output, page(results, machine, size, dtype, begin))
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
