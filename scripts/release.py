"""Checks of a release, and its notes: `make release` runs this after building the packages into `dist/`."""

import re
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTENTS = (
    "sdllava/py.typed",
    "sdllava/miniature/sdllava-mini/model.safetensors",
    "sdllava/miniature/sdllava-smol/adapter_model.safetensors",
    "sdllava/train/recipes/align.yaml",
    "sdllava/train/configs/zero2.yaml",
    "sdllava/hub/card.md.jinja",
    "sdllava/evaluation/metrics/benchmark_score/benchmark_score.py",
)
"""Files that the wheel must contain, one of each kind that is not a module."""


def package_version() -> str:
    """The version in `sdllava/version.py`.

    Raises:
        ValueError: CITATION.cff has another one.
    """
    text = (ROOT / "sdllava/version.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.+)"', text, re.M)[0]
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8"):
        raise ValueError(f"The version of CITATION.cff is not {version!r}. Set it.")
    return version


def release_notes(changelog: str, version: str) -> str:
    """The section of a version in the changelog, with links to the documentation that work outside the repository.

    Args:
        changelog: The text of CHANGELOG.md.
        version: For example "0.2.0".

    Raises:
        ValueError: The changelog has no dated section of this version.
    """
    found = re.search(rf"^## {re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no section '## {version} (YYYY-MM-DD)'. Date it.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = f"{project['urls']['Repository']}/blob/v{version}/"
    notes = re.sub(r"\]\((?![a-z]+:)", f"]({address}", found[2].strip())
    return f"# sdllava {version} ({found[1]})\n\n{notes}\n"


def check_wheel(path: Path, version: str) -> None:
    """Check a wheel's name and contents.

    Args:
        path: The wheel.
        version: The version of the package.

    Raises:
        ValueError: It has another version, lacks a file, contains what does not belong into it, or has links
            in its description that do not work on PyPI.
    """
    if not path.name.startswith(f"sdllava-{version}-"):
        raise ValueError(f"{path.name!r} is not the wheel of version {version!r}. Empty dist/ and build again.")
    wheel = zipfile.ZipFile(path)
    names = wheel.namelist()
    if missing := [name for name in CONTENTS if name not in names]:
        raise ValueError(f"{path.name!r} lacks {missing[0]!r}. Add it to package-data in pyproject.toml.")
    if foreign := [name for name in names if not name.startswith(("sdllava/", f"sdllava-{version}.dist-info/"))]:
        raise ValueError(f"{path.name!r} contains {foreign[0]!r}, which is not part of the package.")
    metadata = wheel.read(f"sdllava-{version}.dist-info/METADATA").decode()
    if relative := re.search(r"\]\((?![a-z]+:|#)[^)]*\)", metadata):
        raise ValueError(f"{path.name!r} has the relative link {relative[0]!r} in its description. Mend setup.py.")


def main(dist: Path, notes: Path) -> None:
    """Check the packages in a folder, and write the release notes."""
    version = package_version()
    wheels = sorted(dist.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"{str(dist)!r} has {len(wheels)} wheels instead of one. Empty it and build again.")
    wheel = wheels[0]
    check_wheel(wheel, version)
    text = release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    notes.write_text(text, encoding="utf-8")
    size = wheel.stat().st_size / 2**20
    print(
        f"{wheel.name}: {size:.1f} MiB. Notes: {notes}. Tag v{version}, then upload {dist}/*.whl and {dist}/*.tar.gz."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
