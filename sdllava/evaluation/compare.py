"""Tables of finished runs next to the papers' rows, with 95% bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .benchmarks import BENCHMARKS, get_benchmark, get_matching_benchmark
from .benchmarks.base import Benchmark, unit_means
from .benchmarks.matching_base import MatchingBenchmark
from .bootstrap import difference
from .published import PublishedRow, published_rows
from .results import load_results


@dataclass(frozen=True)
class Run:
    """One finished run: its label, the contents of `results.json`, and its records."""

    label: str
    results: dict[str, Any]
    records: list[dict]

    @property
    def blind_scores(self) -> dict[str, float]:
        """The scores with grey images, empty where they were not measured. In a blind run, `blind` itself is true."""
        blind = self.results.get("blind")
        return blind["scores"] if isinstance(blind, dict) else {}

    def scorer(self) -> Benchmark | MatchingBenchmark:
        """The benchmark that computed the run's scores."""
        name = self.results["benchmark"]
        if name not in BENCHMARKS:
            return get_matching_benchmark(name)
        return get_benchmark(name, self.results["protocol"]["name"])


@dataclass(frozen=True)
class Comparison:
    """All runs of one benchmark, the papers' rows, and each run's difference from the first in the headline score."""

    benchmark: str
    metric: str
    runs: list[Run]
    published: list[PublishedRow]
    differences: list[dict]

    @property
    def headline(self) -> list[str]:
        """Names of the overall scores, which are not those of a single task or pattern."""
        return [name for name in self.runs[0].results["scores"] if not self._is_part(name)] or [self.metric]

    @property
    def parts(self) -> list[str]:
        """Names of the scores of single tasks or patterns."""
        return [name for name in self.runs[0].results["scores"] if self._is_part(name)]

    def _is_part(self, name: str) -> bool:
        if self.benchmark == "blink":
            return name not in ("macro", "micro")
        if self.benchmark in ("mmvp_vlm", "mini_pairs", "sugarcrepe"):
            return name != "average"
        return "/" in name


def compare(paths: Sequence[str | Path]) -> list[Comparison]:
    """One comparison per benchmark in the folders, in order of appearance.

    Args:
        paths: Folders of runs, or folders above them.

    Raises:
        FileNotFoundError: A folder contains no finished run.
        ValueError: A file is damaged.
    """
    by_benchmark: dict[str, list[Run]] = {}
    for path in paths:
        for results, records in load_results(path):
            run = Run(Path(path).resolve().name, results, records)
            by_benchmark.setdefault(results["benchmark"], []).append(run)
    comparisons = []
    for name, runs in by_benchmark.items():
        runs = _labelled(runs)
        metric = runs[0].results["metric"]
        published = [row for row in published_rows(name) if not metric.endswith("(simple tokens)")]
        comparisons.append(Comparison(name, metric, runs, published, _differences(runs, metric)))
    return comparisons


def _labelled(runs: list[Run]) -> list[Run]:
    """Unique labels: the given folders, else the models, else both, else both with a number."""
    models, folders = [str(run.results["model"]["id"]) for run in runs], [run.label for run in runs]
    both = [f"{folder}: {model}" for folder, model in zip(folders, models, strict=True)]
    numbered = [f"{label} ({number})" for number, label in enumerate(both, 1)]
    choices = (folders, models, both, numbered) if len(runs) > 1 else (models,)
    labels = next(choice for choice in choices if len(set(choice)) == len(runs))
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _differences(runs: list[Run], metric: str) -> list[dict]:
    if len(runs) == 1:
        return []
    scorer = runs[0].scorer()
    first = scorer.units(runs[0].records)
    found = []
    for run in runs[1:]:
        other = run.scorer()
        second = other.units(run.records)
        # caption scores have their tokeniser in their names, and Java may be installed now but not then, or vice versa
        comparable = metric == scorer.metric == other.metric and metric in run.results["scores"]
        scored = all(units and metric in scorer.scores(unit_means(units)) for units in (first, second))
        same = _same_questions(runs[0], run)
        usable = comparable and scored
        found.append(difference(first, second, scorer.scores, metric, same_questions=same) if usable else {})
    return found


def _same_questions(first: Run, second: Run) -> bool:
    """Whether records with the same id are about the same question.

    They have the same target and texts and, in the same protocol, the same prompt. Fields that a record lacks are not
    compared.
    """
    names = [(run.results.get("protocol") or {}).get("name") for run in (first, second)]
    fields = ("target", "texts", "prompt") if names[0] == names[1] else ("target", "texts")
    others = {record["id"]: record for record in second.records}
    return all(
        record[field] == others[record["id"]][field]
        for record in first.records
        if record["id"] in others
        for field in fields
        if field in record and field in others[record["id"]]
    )


def markdown(comparison: Comparison) -> str:
    """Markdown tables: overview, differences from the first run, tasks or patterns, notes."""
    lines = [f"## {comparison.benchmark}", "", *_overview(comparison)]
    if comparison.differences:
        lines += ["", *_difference_lines(comparison)]
    if comparison.parts:
        lines += ["", *_parts(comparison)]
    notes = _notes(comparison.runs)
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def _notes(runs: Sequence[Run]) -> list[str]:
    """Protocol, judge and remarks. A note that several runs share appears once."""
    runs_with: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        notes = dict(run.results.get("notes", {}))
        if protocol := run.results.get("protocol"):
            notes["protocol"] = f"{protocol['name']}: {protocol['description']}"
        if judge := run.results.get("judge"):
            notes["judge"] = judge
        for note in sorted(notes.items()):
            runs_with.setdefault(note, []).append(run.label)
    return [f"- {', '.join(labels)}: {name}: {text}" for (name, text), labels in runs_with.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [line[0], "|" + "---|" * len(header), *line[1:]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _overview(comparison: Comparison) -> list[str]:
    columns = comparison.headline
    rows = []
    for run in comparison.runs:
        scores, intervals = run.results["scores"], run.results.get("intervals_95", {})
        cells = []
        for column in columns:
            span = intervals.get(column)
            cells.append(_number(scores.get(column)) + (f" [{span[0]:.2f}, {span[1]:.2f}]" if span else ""))
        rows.append([f"**{run.label}**", *cells])
        if blind := run.blind_scores:
            rows.append([f"{run.label}, blind", *(_number(blind.get(column)) for column in columns)])
    if chance := comparison.runs[0].results.get("chance"):
        rows.append(["chance", *(_number(chance.get(column)) for column in columns)])
    for row in comparison.published:
        if any(column in row.scores for column in columns):
            rows.append([f"{row.model} ({row.source})", *(_number(row.scores.get(column)) for column in columns)])
    return _table(["model", *columns], rows)


def _difference_lines(comparison: Comparison) -> list[str]:
    lines = []
    for run, found in zip(comparison.runs[1:], comparison.differences, strict=True):
        if found:
            low, high = found["interval"]
            how = "paired" if found["paired"] else "not paired: different samples"
            lines.append(
                f"- {run.label} minus {comparison.runs[0].label}, {comparison.metric}: "
                f"{found['difference']:+.2f} [{low:+.2f}, {high:+.2f}] ({how})"
            )
    return lines


def _parts(comparison: Comparison) -> list[str]:
    columns = {}
    for run in comparison.runs:
        columns[run.label] = run.results["scores"]
        if run.blind_scores:
            columns[f"{run.label}, blind"] = run.blind_scores
    if chance := comparison.runs[0].results.get("chance"):
        columns["chance"] = chance
    rows = [[part, *(_number(scores.get(part)) for scores in columns.values())] for part in comparison.parts]
    return _table(["task or pattern", *columns], rows)
