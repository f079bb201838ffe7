"""Configuration of the documentation: `make docs` builds it with Sphinx, and fails on warnings.

The source folder is the root of the repository, so that pages link to files next to `docs/` as they do on GitHub.
"""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "sdllava"
author = "The sdllava authors"
release = re.search(r'__version__ = "(.+)"', (ROOT / "sdllava/version.py").read_text(encoding="utf-8"))[1]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "*.md", "perf/*.md", "research/**.md", "sdllava/miniature/**.md"]
exclude_patterns = [".*", "build", "dist", "tests", "notebooks", "README.md"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

myst_heading_anchors = 4

autodoc_mock_imports = ["deepspeed", "lmms_eval", "open_clip"]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!sdllava\.).*"), (r"py:class", r"sdllava\..*\.(T|U|Class)")]
"""References to this package must resolve, apart from type variables. Those to others would need the network."""

html_theme = "furo"
html_title = f"sdllava {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "",
}
html_show_sphinx = False
html_show_copyright = False
copybutton_prompt_text = "$ "
toc_object_entries_show_parents = "hide"


API = ROOT / "docs" / "api"
FOLDERS = {
    ".": "The model",
    "data": "Data",
    "train": "Training",
    "evaluation": "Evaluation",
    "evaluation/benchmarks": "Benchmarks",
    "analysis": "Analysis",
    "hub": "Hub",
    "serving": "Server",
    "scenes": "Rendered scenes",
}
"""The folders of the package in the API reference, with their titles."""


def write_api_pages(app: Any) -> None:
    """Write `docs/api/`, which git ignores: one page per module, and one per folder that lists its modules."""
    written = set()
    for folder, title in FOLDERS.items():
        name = "model" if folder == "." else folder.replace("/", "-")
        modules = [path for path in sorted((ROOT / "sdllava" / folder).glob("*.py")) if not path.name.startswith("__")]
        rows, entries = [], []
        for path in modules:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            rows.append(f"| [`{module}`]({module}.md) | {' '.join(summary.split())} |")
            entries.append(module)
            written.add(f"{module}.md")
            _write(f"{module}.md", f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n")
        table = "\n".join(["| module | content |", "|---|---|", *rows])
        toctree = "\n".join(["```{toctree}", ":hidden:", "", *entries, "```"])
        written.add(f"{name}.md")
        _write(f"{name}.md", f"# {title}\n\n{table}\n\n{toctree}\n")
    for path in API.glob("*.md"):
        if path.name not in written:  # of a module that no longer exists
            path.unlink()


def _write(name: str, text: str) -> None:
    """Write a page of the API reference if it changes, so that unchanged pages are not built again."""
    API.mkdir(exist_ok=True)
    path = API / name
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def read_notation(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn transformers' notation in docstrings into Sphinx's.

    Links such as [`~sdllava.taps.list_taps`] become references, a list of arguments that continues on the next line
    becomes one line, |x| is not a substitution, tables become literal blocks, and `name`s becomes valid.
    """
    text = re.sub(r"(?m)^(\s+\w[\w, ]*,)\n\s+(?=[\w, ]+(?: \(.*\))?:)", r"\1 ", "\n".join(lines))
    text = re.sub(r"\[`(~?sdllava\.[\w.]+)`\]", r":py:obj:`\1`", text)
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)
    text = re.sub(r"(?m)^(?!\| |\|-).*\|.*$", lambda line: _escape_bars(line[0]), text)
    text = re.sub(r"(?m)(?:^\|.*\n)+", lambda table: "::\n\n" + re.sub("(?m)^(?=.)", "    ", table[0]) + "\n", text)
    lines[:] = re.sub(r"(?<![`:\w])(`[^`\n]+`)(?=\w)", r"\1\\ ", text).split("\n")


def _escape_bars(line: str) -> str:
    """A line in which |x| outside backticks is text."""
    return re.sub(r"(`+.*?`+)|\|", lambda found: found[1] or r"\|", line)


def setup(app: Any) -> None:
    """Register the hooks."""
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", read_notation, priority=400)
