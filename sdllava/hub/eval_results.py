"""Evaluation results in the Hub's format, `.eval_results/*.yaml`, next to the `model-index` of the card."""

from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

FOLDER = ".eval_results"


def eval_result_files(evaluations: list[dict[str, Any]]) -> dict[str, bytes]:
    """One file per benchmark, with an entry for each evaluation on a data set of the Hub.

    Args:
        evaluations: Contents of `results.json` files, as `Records.results` has them.

    Returns:
        `dict[str, bytes]`: Contents by path in the repository.
    """
    import yaml

    entries: dict[str, list[EvalResultEntry]] = {}
    for results in evaluations:
        value, data = results["scores"].get(results["metric"]), results.get("data") or {}
        if value is not None and "/" in (data.get("id") or ""):
            entry = EvalResultEntry(
                dataset_id=data["id"],
                task_id=results["benchmark"],
                value=round(value, 2),
                dataset_revision=data.get("revision"),
                notes=_notes(results),
            )
            entries.setdefault(results["benchmark"], []).append(entry)
    return {
        f"{FOLDER}/{benchmark}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False).encode()
        for benchmark, found in entries.items()
    }


def _notes(results: dict[str, Any]) -> str:
    protocol = results.get("protocol") or {}
    scales = results.get("guidance_scales")
    parts = [
        results["metric"],
        protocol.get("name") and f"protocol {protocol['name']}",
        scales and "guidance " + ", ".join(map(str, scales)),
        results.get("samples") and f"{results['samples']} samples",
    ]
    return ", ".join(part for part in parts if part)
