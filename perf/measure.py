"""Shared parts of the performance scripts: timed rounds, operation counts, the machine's peak, a table and its JSON."""

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

from sdllava.atomic_files import write_json
from sdllava.grids import as_map, resize_grid

Size = Annotated[Literal["full", "mini"], typer.Option(help="Published sizes with random weights, or small ones.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds. The table shows their median.")]
Output = Annotated[Path | None, typer.Option(help="JSON file; default perf/results/NAME-SIZE-DEVICE.json.")]

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"

Call = Callable[[], Any]


@dataclass
class Row:
    """One measured call.

    Args:
        name (`str`): What is measured.
        reference (`str`, *optional*): Name of the row of the same run that the ratio refers to.
        seconds (`list[float]`): Seconds of each round.
        gflop (`float`): Floating-point operations of one call in units of 10^9. A multiply-add counts as two.
        memory_gib (`float`, *optional*): Peak memory during the call: of the GPU, or of the process on a CPU.
        per_call (`int`): Number of images, questions or tokens that one call processes.
        note (`str`): Another figure of the same call, for example the difference from the reference's result.
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
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)


class Bench:
    """Measures calls on one machine and reports them as a table and as JSON.

    Args:
        title (`str`): Title of the table.
        size (`str`): `"full"`, `"mini"` or `"given"`. Recorded, and part of the default file name.
        device (`str`): Torch device.
        dtype (`str`): Name of the weights' torch dtype.
        repeats (`int`): Timed rounds.
        output (`Path`, *optional*): The JSON file.
        settings (`Any`): Further settings to record. `wall_clock=True` forces the wall clock.

    Raises:
        SystemExit: If the device or the dtype is not available.
    """

    def __init__(
        self, title: str, size: str, device: str, dtype: str, repeats: int, output: Path | None, **settings: Any
    ):
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise SystemExit(f"--device {device!r} needs a CUDA GPU, and torch finds none. Use --device cpu.")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise SystemExit(f"--dtype {dtype!r} is not supported. Use float32, bfloat16 or float16.")
        self.title, self.device, self.dtype, self.repeats = title, torch.device(device), getattr(torch, dtype), repeats
        name = Path(sys.argv[0]).stem
        results = Path(__file__).parent / "results" / f"{name}-{size}-{self.device.type}.json"
        self.output = output or results
        self.rows: list[Row] = []
        self.results: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.settings: dict[str, Any] = {
            "size": size,
            "device": device,
            "dtype": dtype,
            "repeats": repeats,
            **settings,
        }
        self.console = Console()
        self.console.width = max(self.console.width, 150)

    @property
    def clock(self) -> str:
        """Unit of the times: CPU seconds with one thread on a CPU, otherwise seconds of wall clock."""
        single = self.device.type == "cpu" and torch.get_num_threads() == 1
        return "CPU seconds of this process" if single and not self.settings.get("wall_clock") else "seconds"

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock.startswith("CPU") else time.perf_counter()

    def time(self, calls: dict[str, Call], reference: str | None = None, per_call: int = 1) -> dict[str, Row]:
        """Times calls in rounds and adds their rows.

        Each round runs every call once, so that a change of the machine's speed affects all calls equally. The first
        run of each call is not timed: it warms up, counts operations and sets the entry in `results`.

        Args:
            calls (`dict[str, Call]`): The calls by row name.
            reference (`str`, *optional*): Name of the row that the ratios refer to; default the first.
            per_call (`int`): Number of items that one call processes.

        Returns:
            `dict[str, Row]`: The new rows by name.
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
        """Prints a finding that is not a timing, and keeps it for the JSON file."""
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
        """GFLOP/s of the fastest of five square matrix products in this dtype, by the clock of the rows."""
        side = 8192 if self.device.type == "cuda" else 2048 if self.settings["size"] == "full" else 1024
        a = torch.randn(side, side, device=self.device, dtype=self.dtype)
        a @ a
        best = float("inf")
        for _ in range(5):
            start = self._now()
            a @ a
            best = min(best, self._now() - start)
        return 2 * side**3 / best / 1e9

    def report(self) -> None:
        """Prints the table and writes the JSON file."""
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
        self.console.print(f"{machine}, matrix peak {peak:.0f} GFLOP/s. Ratio: the speed-up over the reference.")
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
    """Counts the operations of one uncompiled call, fused attention included on every device.

    Args:
        call (`Callable`): The call to run once.

    Returns:
        `tuple[float, Any]`: Operations in units of 10^9, and the call's result.
    """
    aten = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.compiler.set_stance("force_eager"), counter:
        result = call()
    return counter.get_total_flops() / 1e9, result


def tokens_on_grid(features: torch.Tensor, size: int) -> torch.Tensor:
    """The output of a tap, tokens or maps, as tokens of shape `(n, size ** 2, channels)`."""
    return resize_grid(as_map(features) if features.ndim == 3 else features, size)


def difference(result: torch.Tensor, expected: torch.Tensor) -> str:
    """Describes the norm of the difference, relative to the norm of the expected tensor."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    return f"differs by {error.item():.1e}"


def describe_machine(device: torch.device) -> str:
    """Describes the device, the number of threads and the versions."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_kind()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    return f"{kind}, {torch.get_num_threads()} thread(s), {versions}, Python {platform.python_version()}"


def _cpu_kind() -> str:
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def batches(given: Sequence[int] | None, largest: int) -> list[int]:
    """Batch sizes to measure: the given ones, otherwise 1, 2, 4, ... up to `largest`."""
    if given:
        return list(given)
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]
