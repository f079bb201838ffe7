"""A folder that is replaced is the old one or the new one, also after the process was killed in between."""

import os
import signal
from functools import partial
from pathlib import Path

import forks
import pytest

from sdllava.atomic_files import atomic_path


def write(place: Path, text: str) -> None:
    with atomic_path(place) as written:
        written.mkdir()
        (written / "file").write_text(text)


def replace_and_die(place: Path) -> None:
    """Write a new folder and die after the old one was renamed."""
    rename = os.replace

    def rename_and_die(source: Path, target: Path) -> None:
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = rename_and_die
    write(place, "new")


@pytest.mark.parametrize("same_number", [False, True])
def test_a_folder_whose_replacement_was_killed_is_put_back_by_the_next_call(tmp_path, same_number):
    place = tmp_path / "model"
    write(place, "old")
    process = forks.start(partial(replace_and_die, place), tmp_path / "log")
    assert forks.end(process) == -signal.SIGKILL
    if same_number:  # the first process of a container has the number of the one before it
        for left in tmp_path.glob(f".*-{process}-*"):
            left.rename(left.with_name(left.name.replace(f"-{process}-", f"-{os.getpid()}-")))
    assert not place.exists()
    with pytest.raises(KeyError), atomic_path(place):
        raise KeyError
    assert (place / "file").read_text() == "old"
    write(place, "newer")
    assert (place / "file").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "model"]
