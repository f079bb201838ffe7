"""Sources of samples as one `datasets` dataset: LLaVA's JSON, JSON Lines, and whatever `datasets` reads.

A row holds the fields of a record (`records.py`), with its images undecoded as `{"bytes", "path"}`, and `error`, which
is empty where the sample is usable. Rows are decoded when they are accessed. They are read from memory-mapped Arrow
files in the cache of `datasets`, which all processes of a machine share. The first process writes them; the others
wait.
"""

import glob
import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from ..names import REPOSITORY
from ..repositories import split_revision
from . import json_files, records
from .json_files import TOO_DEEP, json_array, json_lines
from .records import Record, RecordError, split_turns, to_record

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


@dataclass
class DataSource:
    """Where samples come from.

    Args:
        path: A `.json` file in LLaVA's format, a `.jsonl` file, `.parquet`, `.arrow` or `.tar` (webdataset) files or
            patterns of them, a folder that `save_to_disk` wrote, or a repository of the Hub. Files may be addresses
            that fsspec knows, for example `hf://` or `s3://`.
        config: The configuration of a repository.
        split: The split of a repository.
        revision: The revision of a repository.
        image_folder: The folder to which image paths are relative. The default for a JSON file is its own folder.
        weight: The weight of this source in a mixture, above 0. Either every source has one, or none.
    """

    path: str
    config: str | None = field(default=None)
    split: str = "train"
    revision: str | None = field(default=None)
    image_folder: str | None = field(default=None)
    weight: float | None = field(default=None)


def load_data(
    sources: list[DataSource],
    streaming: bool = False,
    one_record_per_turn: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> "Dataset | IterableDataset":
    """Load the samples of all sources, concatenated, or mixed by their weights.

    With weights, sources are sampled in proportion to them. An epoch ends when every sample has been used. Smaller
    sources are repeated until then.

    Args:
        sources: Where the samples come from.
        streaming: Read samples as they are needed, instead of indexing them first.
        one_record_per_turn: Make every answer a sample, with the conversation before it as context.
        shuffle_buffer: With `streaming`, the number of samples among which the next one is drawn. 0 keeps the order.
        seed: The seed of mixing and shuffling.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: There is no source, the weights are not usable, or a file is not JSON. Unusable samples do not
            raise here. Their rows have an `error`.
    """
    import datasets

    if not sources:
        raise ValueError("There is no training data. Name at least one source under `datasets`.")
    shares = _shares([source.weight for source in sources])
    parts: list[Any]
    if streaming:
        parts = [_stream(source, one_record_per_turn) for source in sources]
    else:
        tables = [_table(source) for source in sources]
        parts = [_index(table, i, one_record_per_turn) for i, table in enumerate(tables)]
    if shares is None:
        data = datasets.concatenate_datasets(parts)
    else:
        data = datasets.interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    if streaming:
        return data.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else data
    return data.with_transform(_Fetch(tables))


def _shares(weights: list[float | None]) -> list[float] | None:
    """The probability of each source in a mixture, or None without weights."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        raise ValueError(f"The sources have the weights {weights}. Give every source a weight, or none.")
    if min(given) <= 0:
        raise ValueError(f"The sources have the weights {weights}. Use weights above 0.")
    return [weight / sum(given) for weight in given]


def endless(stream: "IterableDataset") -> "IterableDataset":
    """Repeat a stream without end. The column `epoch` of each row is the number of its pass."""
    import datasets

    return datasets.IterableDataset.from_generator(_passes, gen_kwargs={"stream": stream})


def _passes(stream: "IterableDataset") -> Iterator[dict[str, Any]]:
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        for row in stream:
            yield {**row, "epoch": epoch}


def row_features() -> "Features":
    """The columns of a row, for `datasets`."""
    from datasets import Features, List, Value

    return Features(
        {
            "name": Value("string"),
            "images": List({"bytes": Value("binary"), "path": Value("string")}),
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "supervised_from": Value("int64"),
            "folder": Value("string"),
            "error": Value("string"),
        }
    )


@dataclass
class _Table:
    """A source whose rows are accessed by number."""

    data: Any
    path: str
    folder: str | None

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        columns = self.data[list(numbers)]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if "error" in columns:
            return rows
        return [
            _to_row(row, f"{self.path} row {number}", self.folder) for number, row in zip(numbers, rows, strict=True)
        ]


class _Fetch:
    """Transform of an index dataset: index rows become sample rows."""

    def __init__(self, tables: list[_Table]):
        self.tables = tables

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        samples: dict[tuple[int, int], dict[str, Any]] = {}
        for source, table in enumerate(self.tables):
            numbers = sorted({row for of, row in zip(batch["source"], batch["row"], strict=True) if of == source})
            if numbers:
                samples.update(zip(((source, number) for number in numbers), table.rows(numbers), strict=True))
        indices = zip(batch["source"], batch["row"], batch["turn"], strict=True)
        return _columns([_one_turn(samples[source, row], turn) for source, row, turn in indices])


def _one_turn(sample: dict[str, Any], turn: int) -> dict[str, Any]:
    return sample if turn < 0 or sample["error"] else _turn_rows(sample)[turn]


def in_batches(data: "Dataset", size: int = 100) -> Iterator[dict[str, Any]]:
    """The rows of `load_data` in order, read in batches, which is several times faster than one by one.

    Args:
        data: The data, not streamed.
        size: Rows of a batch.
    """
    for batch in data.iter(batch_size=size):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _index(table: _Table, source: int, one_record_per_turn: bool) -> "Dataset":
    import datasets

    rows = np.arange(len(table.data), dtype=np.int32)
    turns = np.full(len(rows), -1, dtype=np.int16)
    if one_record_per_turn:
        counts = [len(_turn_rows(row)) for numbers in _chunks(len(rows)) for row in table.rows(numbers)]
        rows = np.repeat(rows, counts)
        turns = np.concatenate([np.arange(count, dtype=np.int16) for count in counts])
    sources = np.full(len(rows), source, dtype=np.int16)
    return datasets.Dataset.from_dict({"source": sources, "row": rows, "turn": turns})


def _chunks(count: int, size: int = 100) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _table(source: DataSource) -> _Table:
    if _is_json(source.path):
        return _Table(_json_table(source.path, _folder(source)), source.path, _folder(source))
    return _Table(_undecoded(_load(source, streaming=False)), source.path, source.image_folder)


def _json_table(path: str, folder: str) -> "Dataset":
    """The rows of a JSON file as memory-mapped Arrow, converted again when the file or the code of records changes."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    _require_file(path)
    filesystem, inner = fsspec.core.url_to_fs(path)
    digest = hashlib.sha256(json.dumps([path, folder, filesystem.ukey(inner)]).encode())
    for code in (__file__, json_files.__file__, records.__file__):
        digest.update(Path(code).read_bytes())
    try:
        return Dataset.from_generator(
            _json_rows,
            features=row_features(),
            gen_kwargs={"path": path, "folder": folder},
            fingerprint=digest.hexdigest(),
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _stream(source: DataSource, one_record_per_turn: bool) -> "IterableDataset":
    import datasets

    generator: Callable[..., Iterator[dict[str, Any]]] = _shard_rows
    arguments: dict[str, Any]
    if _is_json(source.path):
        _require_file(source.path)
        generator, arguments = _json_rows, {"path": source.path, "folder": _folder(source)}
    else:
        stream = _undecoded(_load(source, streaming=True))
        shards = list(range(stream.num_shards))
        arguments = {"shards": shards, "stream": stream, "path": source.path, "folder": source.image_folder}
    data = datasets.IterableDataset.from_generator(generator, features=row_features(), gen_kwargs=arguments)
    return data.map(_expand, batched=True, batch_size=1, features=row_features()) if one_record_per_turn else data


def _shard_rows(
    shards: list[int], stream: "IterableDataset", path: str, folder: str | None
) -> Iterator[dict[str, Any]]:
    """Sample rows of some shards of a stream, which are its files. A damaged one raises where its rows end."""
    for shard in shards:
        place = f"{path} row" if stream.num_shards == 1 else f"{path} shard {shard} row"
        rows, number = iter(stream.shard(num_shards=stream.num_shards, index=shard)), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:
                raise _unreadable(f"{place} {number}", error) from error
            yield _to_row(row, f"{place} {number}", folder)
            number += 1
        archives = _archives(path)
        if len(archives) == stream.num_shards:
            _check_archive(archives[shard])


def _expand(batch: dict[str, list]) -> dict[str, list]:
    return _columns(_turn_rows({column: values[0] for column, values in batch.items()}))


def _columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    return {column: [row[column] for row in rows] for column in row_features()}


def _turn_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row] if row["error"] else [{**record, "error": ""} for record in split_turns(to_record(row))]


def _to_row(row: dict[str, Any], name: str, folder: str | None) -> dict[str, Any]:
    try:
        return _row(to_record(row, name, folder))
    except RecordError as error:
        return _bad_row(name, str(error))
    except RecursionError:
        return _bad_row(name, TOO_DEEP)


def _row(record: Record) -> dict[str, Any]:
    images = [{"bytes": None, "path": image} if isinstance(image, str) else image for image in record["images"]]
    return {**record, "images": images, "error": ""}


def _bad_row(name: str, error: str) -> dict[str, Any]:
    error = error.encode(errors="backslashreplace").decode()
    return {"name": name, "images": [], "messages": [], "supervised_from": 0, "folder": None, "error": error}


def _load(source: DataSource, streaming: bool) -> Any:
    import datasets

    suffix, is_local = Path(source.path).suffix, Path(source.path).exists()
    try:
        if suffix in BUILDERS:
            files = {"train": source.path}
            for archive in _archives(source.path) if not streaming else ():
                _check_archive(archive)
            return datasets.load_dataset(BUILDERS[suffix], data_files=files, split="train", streaming=streaming)
        if (Path(source.path) / "state.json").is_file():
            data = datasets.load_from_disk(source.path)
            return data.to_iterable_dataset() if streaming else data
        path, revision = source.path, source.revision
        if not is_local and "://" not in path:
            if not REPOSITORY.fullmatch(path):
                raise FileNotFoundError(
                    f"There is no data at {path!r}. Give an existing file or folder, or a repository owner/name."
                )
            named = split_revision(path)
            path, revision = named["pretrained_model_name_or_path"], revision or named.get("revision")
        return datasets.load_dataset(path, source.config, split=source.split, revision=revision, streaming=streaming)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow, tarfile and datasets have errors of their own
        if suffix in BUILDERS or (is_local and type(error) is not ValueError):
            raise _unreadable(source.path, error) from error
        raise  # about a repository, or about the options


def _archives(path: str) -> list[str]:
    """The local tar files that a path or pattern names."""
    return sorted(glob.glob(path)) if path.endswith(".tar") else []


def _check_archive(path: str) -> None:
    """Check the headers of a tar file. The reader of `datasets` stops at a damaged one as at the end of the file.

    Raises:
        ValueError: The file is damaged or truncated.
    """
    try:
        with tarfile.open(path) as archive:
            for _ in archive:
                pass
            stream: Any = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"no member and no end at byte {archive.offset}")
    except (ValueError, tarfile.TarError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error  # datasets' error only says that there is one
    reason = (str(cause).splitlines() or [type(cause).__name__])[0]
    return ValueError(f"The data {path!r} cannot be read ({reason}). Give intact files.")


def _undecoded(data: Any) -> Any:
    """Leave images as bytes or paths, so that one broken image does not end the run."""
    from datasets import Image, List

    for column, feature in (data.features or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return data


def _is_json(path: str) -> bool:
    return Path(path).suffix in (".json", ".jsonl")


def _folder(source: DataSource) -> str:
    return source.image_folder or source.path.rpartition("/")[0] or "."


def _require_file(path: str) -> None:
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.isfile(inner):
        raise FileNotFoundError(f"There is no data file {path!r}.")


def _json_rows(path: str, folder: str) -> Iterator[dict[str, Any]]:
    """Rows of a `.json` or `.jsonl` file, named by the file, the line on which they begin and their number."""
    _require_file(path)
    name = None
    with fsspec.open(path, "rb") as stream:
        for line, sample in json_lines(stream) if path.endswith(".jsonl") else json_array(stream.read(), path):
            name = f"{path}:{line}"
            if isinstance(sample, dict):
                yield _to_row(sample, name, folder)
            else:
                yield _bad_row(name, f"is not a JSON object: {sample}")
    if name is None:
        raise ValueError(f"The data file {path!r} does not hold any samples.")
