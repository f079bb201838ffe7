"""What the benchmarks share: rounds of timed calls, operation counts, the machine's peak, a table and its JSON."""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Size = Annotated[Literal["full", "mini"], typer.Option(help="Published sizes with random weights, or small ones.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; the table shows medians over them.")]
Output = Annotated[
    Path | None, typer.Option(help="JSON file; default results/NAME-SIZE-DEVICE.json beside the script.")
]

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"

Call = Callable[[], Any]


@dataclass
class Row:
    """One measured call.

    Args:
        name, reference: what it is, and the row of the same run that its ratio refers to.
        seconds: of each round.
        gflop: floating-point operations of one call, two a multiply-add.
        memory_gib: peak while it ran: of the GPU's memory, on a CPU of the process.
        per_call (`int`): how many things (images, questions, tokens) one call serves.
        note: a figure that was computed beside it, for example how far results are from the reference's.
    """

    name: str
    reference: str | None = None
    seconds: list[float] = field(default_factory=list)
    gflop: float = 0.0
    memory_gib: float | None = None
    per_call: int = 1
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Bench:
    """Rows of one run on one machine.

    Raises:
        SystemExit: the device or the type of weights is not there; one sentence.
    """

    def __init__(self, title: str, size: str, device: str, dtype: str, repeats: int, output: Path | None, **settings):
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise SystemExit(f"--device {device}: this machine has no CUDA GPU that torch can use; give --device cpu")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise SystemExit(f"--dtype {dtype!r} is no type of weights: give float32, bfloat16 or float16")
        self.title, self.device, self.dtype, self.repeats = title, torch.device(device), getattr(torch, dtype), repeats
        name = Path(sys.argv[0]).stem
        results = Path(__file__).parent / "results" / f"{name}-{size}-{self.device.type}.json"
        self.output = output or results
        self.rows: list[Row] = []
        self.results: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.settings = {"size": size, "device": device, "dtype": dtype, "repeats": repeats, **settings}
        self.console = Console()
        self.console.width = max(self.console.width, 150)

    @property
    def clock(self) -> str:
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1 and not self.settings.get("wall_clock")
        return "CPU seconds of this process" if alone else "seconds"

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock.startswith("CPU") else time.perf_counter()

    def time(self, calls: dict[str, Call], reference: str | None = None, per_call: int = 1) -> dict[str, Row]:
        """Time calls in rounds, one of each a round, so that a change of the machine meets all alike.

        The first call of each, untimed, warms it up, counts its operations and gives its entry in `results`.

        Args:
            calls: by row name.
            reference: the row that the others' ratio refers to; default the first.
        """
        names = list(calls)
        rows = {name: Row(name, reference or names[0], per_call=per_call) for name in names}
        for name, call in calls.items():
            self.console.print(f"warming up: {name}", style="dim")
            rows[name].gflop, self.results[name] = count_gflop(call)
        for _ in range(self.repeats):
            for name, call in calls.items():
                self._reset_peak()
                start = self._now()
                call()
                rows[name].seconds.append(self._now() - start)
                rows[name].memory_gib = self._peak()
        self.rows += rows.values()
        return rows

    def remark(self, text: str) -> None:
        """A finding that is no row; printed, and kept in the JSON."""
        self.remarks.append(text)
        self.console.print(text)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        status = Path("/proc/self/status")
        if status.exists():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def matrix_peak(self) -> float:
        """GFLOP/s of the best of five square matrix products of this dtype, by the clock of the rows."""
        side = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(side, side, device=self.device, dtype=self.dtype)
        a @ a
        best = float("inf")
        for _ in range(5):
            start = self._now()
            a @ a
            best = min(best, self._now() - start)
        return 2 * side**3 / best / 1e9

    def report(self) -> None:
        """Print the table and write the JSON aside, then into place."""
        peak = self.matrix_peak()
        medians = {row.name: row.median for row in self.rows}
        machine = describe_machine(self.device)
        table = Table("", self.clock, "ratio", "GFLOP", "of peak", "peak GiB", "each", "", title=self.title, box=None)
        for row in self.rows:
            ratio = medians[row.reference] / row.median if row.reference in medians else 1.0
            share = row.gflop / row.median / peak
            table.add_row(
                row.name, f"{row.median:.4g}", f"{ratio:.2f}x", f"{row.gflop:.4g}", f"{share:.0%}",
                "" if row.memory_gib is None else f"{row.memory_gib:.2f}", f"{row.median / row.per_call:.4g}", row.note,
            )  # fmt: skip
        self.console.print(table)
        self.console.print(
            f"{machine}, matrix peak {peak:.0f} GFLOP/s; ratio: how many times faster than its reference"
        )
        write_json(
            self.output,
            {
                "command": " ".join(["python", f"perf/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
                "title": self.title,
                "settings": self.settings,
                "machine": machine,
                "clock": self.clock,
                "matrix_peak_gflops": peak,
                "remarks": self.remarks,
                "rows": [{**asdict(row), "median": row.median} for row in self.rows],
            },
        )
        self.console.print(f"wrote {self.output}")


def count_gflop(call: Call) -> tuple[float, Any]:
    """Operations of one call (10^9), uncompiled, and its result; fused attention counts on CPUs as on GPUs."""
    aten = torch.ops.aten

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.compiler.set_stance("force_eager"), counter:
        result = call()
    return counter.get_total_flops() / 1e9, result


def difference(result: torch.Tensor, expected: torch.Tensor) -> str:
    """How far a result is from the reference's, relative to its size."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    return f"differs by {error.item():.1e}"


def describe_machine(device: torch.device) -> str:
    """Kind of device, threads and versions."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_kind()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    return f"{kind}, {torch.get_num_threads()} thread(s), {versions}, Python {platform.python_version()}"


def _cpu_kind() -> str:
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def batches(given: Sequence[int] | None, largest: int) -> list[int]:
    """Batch sizes to measure: those given, else 1, 2, 4 ... up to `largest`."""
    if given:
        return list(given)
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]
