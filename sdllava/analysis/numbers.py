"""Numbers on disk: `.npz` for notebooks, `.json` for everything else."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".npz", ".json")


def save_numbers(path: str | os.PathLike, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays with what says where they come from, aside, then put them in place.

    A `.npz` file holds the arrays, and `meta` as JSON text; a `.json` file holds nested lists beside `meta`'s fields,
    with null for values that are not finite.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"numbers go to a .npz or .json file, not {target.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        if target.suffix.lower() == ".npz":
            named: dict[str, Any] = {"meta": np.array(json.dumps(meta)), **arrays}
            np.savez_compressed(file, **named)
        else:
            lists = {name: _finite(array.tolist()) for name, array in arrays.items()}
            file.write(json.dumps({**meta, **lists}, indent=1, allow_nan=False).encode())
    os.replace(aside, target)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None
