"""The layout of the repository: who may import whom, what travels with a checkpoint, one helper per job."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from sdllava.remote_code import travelling_files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdllava"
FLAT = {path.stem for path in travelling_files()}
ORDER = (
    ("version", "names", "outputs", "prefix_cache", "atomic_files", "fingerprints", "run_records", "remote_code"),
    ("image_loading", "chat_templates", "questions", "prompts", "repositories", "checkpoint_files"),
    ("taps", "families", "presets", "grids", "diffusion_configuration"),
    ("configuration", "noise", "guidance", "small_maps", "unet_pass", "attention_scores", "attention_maps"),
    ("backbone", "hooked_backbone", "compiled_pass", "latent_backbone", "text_encoder_configs", "flow", "vision"),
    ("stable_diffusion", "pixart", "sd3", "flux", "deepfloyd_if", "backbones"),
    ("checkpoints", "frozen_diffusion", "diffusion", "fusion", "image_model"),
    ("parts", "processors", "assembly", "towers"),
    ("modeling_sdllava", "pipeline"),
)
"""The flat modules, from the lowest to the highest layer. Imports go downwards or stay within a layer."""

ROOMS = {
    "data": {"data"},
    "scenes": {"scenes"},
    "hub": {"hub"},
    "train": {"train", "data", "scenes", "hub", "miniature"},
    "evaluation": {"evaluation", "data", "scenes", "hub", "miniature"},
    "analysis": {"analysis", "data", "scenes", "hub", "miniature"},
}
"""The folders that each folder may import, in addition to flat modules. The others may import everything."""

HELPERS_OF_DATA = {"atomic_files", "image_loading", "names", "questions", "repositories", "version"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for root in ("sdllava", "research", "perf") for path in (ROOT / root).rglob("*.py")}


@cache
def imported_modules(name: str, *, for_types: bool = False) -> set[str]:
    """Modules of this repository that a module imports, also inside functions; not those under TYPE_CHECKING."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    known = {target for target in found if target in FILES}
    return {target for target in known if not any(other.startswith(f"{target}.") for other in known)} - {name}


def test_every_flat_module_has_a_layer():
    assert sorted(name for layer in ORDER for name in layer) == sorted(FLAT)


def test_imports_form_no_circle():
    graph = {name: imported_modules(name, for_types=True) for name in FILES if name != "sdllava"}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"These modules import each other: {' -> '.join(error.args[1])}")
    assert set(order) >= set(graph)


@pytest.mark.parametrize("name", sorted(FLAT))
def test_flat_modules_import_only_lower_flat_modules(name):
    layer = next(i for i, names in enumerate(ORDER) if name in names)
    allowed = {f"sdllava.{other}" for names in ORDER[: layer + 1] for other in names}
    assert imported_modules(f"sdllava.{name}") <= allowed


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_folders_import_only_what_they_may(room):
    flat = HELPERS_OF_DATA if room in ("data", "scenes") else {*FLAT, "registration"}
    for name in FILES:
        if name == f"sdllava.{room}" or name.startswith(f"sdllava.{room}."):
            parts = {target.split(".")[1] for target in imported_modules(name) if target.startswith("sdllava.")}
            assert parts <= ROOMS[room] | flat, f"{name} imports {parts - ROOMS[room] - flat}"


def test_nothing_in_the_package_imports_research_or_perf():
    for name in FILES:
        if name.startswith("sdllava"):
            assert not {target for target in imported_modules(name) if not target.startswith("sdllava")}


def test_travelling_modules_import_their_siblings_relatively():
    for path in travelling_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("sdllava")):
                assert node.level == 1, f"{path.name}: {ast.unparse(node)}"
                assert node.module in FLAT, f"{path.name}: {ast.unparse(node)}"


def test_only_the_atomic_helper_renames_files():
    renames = re.compile(r"\bos\.(replace|rename|renames)\(|\bshutil\.move\(|\.rename\(")
    for name, path in FILES.items():
        if name != "sdllava.atomic_files":
            assert not renames.search(path.read_text(encoding="utf-8")), f"{name} renames files itself"


@pytest.mark.parametrize("pattern", [r"\.__class__\s*=[^=]", r"__module__\.startswith", r"sys\.argv\[0\][^\n]*in \("])
def test_no_class_is_reassigned_and_nothing_depends_on_what_started_the_process(pattern):
    for name, path in FILES.items():
        if name.startswith("sdllava"):
            assert not re.search(pattern, path.read_text(encoding="utf-8")), name
