"""The folder of a run: `run.json` (settings), one line per answered sample, and `results.json` at the end.

Replies are appended to `samples.partial-<process>.jsonl` as they arrive and become `samples.jsonl`, in the benchmark's
order, when the run is complete. The same command resumes a killed run. A folder with another run raises `ValueError`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..atomic_files import is_unfinished, reported, write_json, write_text
from ..run_records import begin_run, is_lock


def read_records(path: Path) -> list[dict]:
    """The records of a JSON Lines file. An incomplete last line, left by a killed run, is removed from the file.

    Raises:
        ValueError: Another line is damaged.
    """
    if not path.exists():
        return []
    records, good = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    break
                records.append(json.loads(line))
            except ValueError:
                raise ValueError(
                    f"{str(path)!r}, line {number}, is damaged. Delete that line, then run the same command again."
                ) from None
            good += len(line)
    if good < path.stat().st_size:
        os.truncate(path, good)
    return records


def _is_ours(path: Path) -> bool:
    return path.name in ("blind", "run.json") or is_lock(path) or is_unfinished(path)


class RunFolder:
    """The folder of one run of one model on one benchmark.

    Args:
        path: Created if it does not exist. The settings of a run without replies are overwritten.
        settings: The identity of the run. Two runs with the same settings give the same replies.
        rank: Index of this process. Only process 0 writes the settings.

    Raises:
        ValueError: The folder contains a run with other settings, a damaged `run.json`, or other files.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], rank: int = 0):
        self.path, self.rank, self.settings = Path(path), rank, settings
        known = self.path / "run.json"
        if known.exists() and self.finished():
            begin_run(known, settings)
        elif rank == 0:
            if self.path.is_dir() and (foreign := [p.name for p in self.path.iterdir() if not _is_ours(p)]):
                raise ValueError(
                    f"{str(self.path)!r} contains {foreign[0]!r} and no run to resume. Choose another --output."
                )
            write_json(known, settings)

    @property
    def partial(self) -> Path:
        """The file to which this process appends its records."""
        return self.path / f"samples.partial-{self.rank}.jsonl"

    def finished(self) -> list[dict]:
        """Every record in the folder, of all processes."""
        paths = [self.path / "samples.jsonl", *sorted(self.path.glob("samples.partial-*.jsonl"))]
        return list({record["id"]: record for path in paths for record in read_records(path)}.values())

    def append(self, records: Iterable[dict]) -> None:
        """Append records and flush them to the disk, so that they survive a kill.

        Raises:
            NotWrittenError: The disk is full, for example. Earlier records are kept.
        """
        with reported(self.partial):
            self.path.mkdir(parents=True, exist_ok=True)  # the folder may not exist on another machine's disk
            with self.partial.open("a", encoding="utf-8") as file:
                file.write(_lines(records))
                file.flush()
                os.fsync(file.fileno())

    def finish(self, records: list[dict], results: dict[str, Any]) -> None:
        """Write `samples.jsonl` and `results.json`, and remove the partial files."""
        write_text(self.path / "samples.jsonl", _lines(records))
        write_json(self.path / "results.json", results)
        for path in self.path.glob("samples.partial-*.jsonl"):
            path.unlink()


def load_results(path: str | Path) -> list[tuple[dict, list[dict]]]:
    """Results and records of a run's folder, or of every run under a folder.

    Raises:
        FileNotFoundError: The folder contains no finished run.
        ValueError: A file is damaged.
    """
    found = sorted(p for p in Path(path).rglob("results.json") if "blind" not in p.relative_to(path).parts[:-1])
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} contains no finished run (no results.json). Finish the run with the same command."
        )
    return [(_read_results(p), read_records(p.with_name("samples.jsonl"))) for p in found]


def _read_results(path: Path) -> dict:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.keys() >= {"benchmark", "model", "metric", "scores"}:
            return results
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{str(path)!r} is damaged, or not a result of `sdllava evaluate`. Run the evaluation again.")


def _lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
