"""`make release`: the notes are the version's section of the changelog, and the wheel has its contents."""

import importlib.util
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

CHANGELOG = """# Changelog

## 0.2.0 (2026-12-01)

### Added

- A page, [families](docs/families.md), and [another](https://example.org).

## 0.1.0

- The first.
"""


def test_notes_are_the_section_with_links_that_work_elsewhere():
    notes = release.release_notes(CHANGELOG, "0.2.0")
    assert notes.startswith("# sdllava 0.2.0 (2026-12-01)\n\n### Added\n")
    assert "/blob/v0.2.0/docs/families.md), and [another](https://example.org)." in notes
    assert "The first" not in notes


@pytest.mark.parametrize("version", ["0.1.0", "0.3.0"])
def test_a_version_without_a_dated_section_raises(version):
    with pytest.raises(ValueError, match=rf"no section '## {version} \(YYYY-MM-DD\)'"):
        release.release_notes(CHANGELOG, version)


def test_the_version_has_a_section_in_the_changelog_and_the_required_files_exist():
    assert f"\n## {release.package_version()} (" in (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in release.CONTENTS if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sdllava-0.2.0-py3-none-any.whl", {}, None),
        ("sdllava-0.1.0-py3-none-any.whl", {}, "not the wheel of version '0.2.0'"),
        ("sdllava-0.2.0-py3-none-any.whl", {"sdllava/py.typed": False}, "lacks 'sdllava/py.typed'"),
        ("sdllava-0.2.0-py3-none-any.whl", {"tests/test.py": True}, "contains 'tests/test.py'"),
        (
            "sdllava-0.2.0-py3-none-any.whl",
            {"sdllava-0.2.0.dist-info/METADATA": "![A picture](docs/answer.png)"},
            r"relative link '\]\(docs/answer.png\)'",
        ),
    ],
)
def test_the_contents_of_a_wheel(tmp_path, name, changes, message):
    present = {**dict.fromkeys(release.CONTENTS, True), "sdllava-0.2.0.dist-info/METADATA": True, **changes}
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        for file in [file for file, kept in present.items() if kept]:
            wheel.writestr(file, present[file] if isinstance(present[file], str) else "")
    if message is None:
        release.check_wheel(tmp_path / name, "0.2.0")
    else:
        with pytest.raises(ValueError, match=message):
            release.check_wheel(tmp_path / name, "0.2.0")
