"""Configuration of the documentation: `make docs` builds it with Sphinx, and fails on warnings.

The source folder is the root of the repository, so that pages link to files next to `docs/` as they do on GitHub.
"""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

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
autodoc_preserve_defaults = True
napoleon_use_param = False  # arguments that share a description stay one entry
napoleon_use_ivar = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 78
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
    "demo": "Demo page",
    "scenes": "Rendered scenes",
}
"""The folders of the package in the API reference, with their titles."""
LONGEST_VALUE = 60
"""Characters of a constant's value in the API reference."""


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

    Links such as [`~sdllava.taps.list_taps`] become references, arguments whose names and type continue on the next
    line become one line, |x| is not a substitution, tables and code blocks become directives, and `name`s becomes
    valid. What precedes a colon in the first line of an attribute is not its type.
    """
    text = "\n".join(lines)
    if what in ("attribute", "data", "property"):
        text = re.sub(r"\A([^\n]*?:) ", r"\1\n", text)
    text = re.sub(r"(?m)^(\s+\w[\w, ]*,)\n\s+(?=[\w, ]+(?: \(.*\))?:)", r"\1 ", text)
    text = re.sub(r"(?m)^(\s+\w[\w, ]* \([^:\n]*)\n\s+(?=[^:\n]*\):)", r"\1 ", text)
    text = re.sub(r"\[`(~?sdllava\.[\w.]+)`\]", r":py:obj:`\1`", text)
    text = re.sub(r"\[(`[^`]+`)\]", r"\1", text)
    text = re.sub(r"(?m)^(?!\| |\|-).*\|.*$", lambda line: _escape_bars(line[0]), text)
    text = re.sub(r"(?m)(?:^\|.*\n)+", lambda table: _list_table(table[0]), text)
    text = re.sub(r"(?ms)^( *)```(\w+)\n(.*?)^ *```$", lambda code: _code_block(*code.groups()), text)
    literal = r"(?<![`:\w])`([^`\n]+)`(?!`)(?=(\w?))"
    lines[:] = re.sub(literal, lambda found: f"``{found[1]}``" + ("\\ " if found[2] else ""), text).split("\n")


def _list_table(table: str) -> str:
    """A Markdown table as a directive."""
    header, _, *rows = [line.strip("|").split("|") for line in table.splitlines()]
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in (header, *rows):
        lines += [f"    {' ' if column else '*'} - {cell.strip()}" for column, cell in enumerate(row)]
    return "\n".join([*lines, "", ""])


def _code_block(indent: str, language: str, code: str) -> str:
    return f"{indent}.. code-block:: {language}\n\n" + re.sub("(?m)^(?=.)", "    ", code)


def _escape_bars(line: str) -> str:
    """A line in which |x| outside backticks is text."""
    return re.sub(r"(`+.*?`+)|\|", lambda found: found[1] or r"\|", line)


def read_signature(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Leave the fields of transformers' configurations out, and write defaults that are not Python as an ellipsis.

    Sphinx would split such signatures at every comma.
    """
    if signature is None:
        return None
    if signature.startswith("(transformers_version: ") and "*, " in signature:
        signature = "(*, " + signature.partition("*, ")[2]
    return re.sub(r"= <.*?>+(?=, |\))", "= ...", signature), returned


def skip_member(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Skip the fields of named tuples that have no description."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


def shorten(app: Any, domain: str, kind: str, content: Any) -> None:
    """Write values that do not fit a line as an ellipsis, and remove the base class `object`."""
    for value in content.parent.findall(addnodes.desc_annotation):
        if value.astext().startswith(" = ") and len(value.astext()) > LONGEST_VALUE:
            value[-1] = nodes.Text("…")
    if kind == "class" and content.children and content[0].astext() == "Bases: object":
        content.remove(content[0])


def setup(app: Any) -> None:
    """Register the hooks."""
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", read_notation, priority=400)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("object-description-transform", shorten)
