"""Cold start of `sdllava ask` on the embedded miniature, as whole processes.

Compares the command with a process that only imports its libraries (torch, and the classes of transformers and
diffusers that the miniature needs) and loads the checkpoint. Both are started in turn, so that a change of the
machine's load affects both.

    python perf/cold_start.py
    python perf/cold_start.py --repeats 9
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdllava.atomic_files import write_json
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

LOADING = """
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import (
    AutoModelForImageTextToText, AutoProcessor, CLIPTextModel, CLIPVisionModel, GenerationMixin, LlamaForCausalLM,
    PreTrainedModel, ProcessorMixin,
)
from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor, mini_path
SDLlavaForConditionalGeneration.from_pretrained(mini_path())
SDLlavaProcessor.from_pretrained(mini_path())
"""
"""The reference process."""

REFERENCE, MEASURED = "import the libraries, load the checkpoint", "sdllava ask IMAGE QUESTION"


@dataclass
class Process:
    """A command and its measurements.

    Args:
        name (`str`): What it does.
        command (`list[str]`): The command line.
        cpu (`list[float]`): CPU seconds of each run, user and system.
        wall (`list[float]`): Seconds of each run.
    """

    name: str
    command: list[str]
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run the command once and keep its times.

        Raises:
            subprocess.CalledProcessError: The command failed.
        """
        before, start = os.times(), time.perf_counter()
        subprocess.run(self.command, check=True, capture_output=True)
        self.wall.append(time.perf_counter() - start)
        after = os.times()
        self.cpu.append(after.children_user - before.children_user + after.children_system - before.children_system)


def measure(image: Path, repeats: int) -> dict[str, Process]:
    """Run both processes in turn.

    Args:
        image: A scene to ask about.
        repeats: Runs of each process. One more, which fills the disk's cache, is not counted.

    Returns:
        `dict[str, Process]`: `REFERENCE` and `MEASURED`.
    """
    question = sample_question("test", 0)[1].text
    processes = [
        Process(REFERENCE, [sys.executable, "-c", LOADING]),
        Process(MEASURED, [sys.executable, "-m", "sdllava", "ask", str(image), question]),
    ]
    for process in processes:
        Process(process.name, process.command).run()
    for _ in range(repeats):
        for process in processes:
            process.run()
    return {process.name: process for process in processes}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each process. The table shows their medians.")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file; default perf/results/cold_start.json.")] = None,
) -> None:
    """Measures CPU seconds and wall-clock seconds of both processes and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "scene.png"
        render(sample_question("test", 0)[0]).save(image)
        processes = measure(image, repeats)
    clocks = {"CPU seconds": "cpu", "seconds": "wall"}
    medians = {name: {c: statistics.median(getattr(p, c)) for c in clocks.values()} for name, p in processes.items()}
    ratios = {clock: medians[MEASURED][clock] / medians[REFERENCE][clock] for clock in clocks.values()}
    table = Table("median of each process", *clocks, title="cold start", box=None)
    for name, values in medians.items():
        table.add_row(name, *(f"{values[clock]:.2f}" for clock in clocks.values()))
    table.add_row("ratio", *(f"{ratios[clock]:.2f}" for clock in clocks.values()))
    console = Console()
    console.print(table)
    target = output or Path(__file__).parent / "results" / "cold_start.json"
    rows = {name: {"cpu": process.cpu, "wall": process.wall} for name, process in processes.items()}
    write_json(target, {"repeats": repeats, "cores": os.cpu_count(), "ratio": ratios, "medians": medians, "runs": rows})
    console.print(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
