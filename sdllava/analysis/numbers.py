"""Arrays on disk: `.npz` for notebooks, `.json` for everything else."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import atomic_path

NUMBER_SUFFIXES = (".npz", ".json")


def save_numbers(path: str | os.PathLike, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write arrays with the record of their origin, atomically.

    Args:
        path: A `.npz` file, which holds the arrays and `meta` as JSON text; or a `.json` file, which holds the fields
            of `meta` and the arrays as nested lists, with null for values that are not finite.
        arrays: The arrays by name.
        meta: JSON values, such as the model's name and the question.

    Raises:
        ValueError: The file has another suffix.
    """
    target = Path(path)
    if target.suffix.lower() not in NUMBER_SUFFIXES:
        raise ValueError(f"Numbers cannot be written to {target.name!r}. Use a .npz or .json file.")
    with atomic_path(target) as written, open(written, "wb") as file:
        if target.suffix.lower() == ".npz":
            named: dict[str, Any] = {"meta": np.array(json.dumps(meta)), **arrays}
            np.savez_compressed(file, **named)
        else:
            lists = {name: _finite(array.tolist()) for name, array in arrays.items()}
            file.write(json.dumps({**meta, **lists}, indent=1, allow_nan=False).encode())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None
