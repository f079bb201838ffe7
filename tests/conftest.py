"""Fixtures that many tests share: tiny published repositories, built once a run."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; the workers share the cores
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="sdllava-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the commands: equal bits in every process

import pytest
from filelock import FileLock

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config):
    """Register the other fixtures, except in the process that only controls xdist's workers: it imports no torch."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        for name in ("train_fixtures", "fixtures_evaluation"):
            config.pluginmanager.import_plugin(name)


def pytest_collection_finish():
    """Keep what the libraries hold out of later garbage collections, each of which would take 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


BuildOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def build_once(tmp_path_factory) -> BuildOnce:
    """Builds a folder once per session, whichever worker needs it first; tests only read it.

    The fixture is a function of a name and of what fills the new folder, and returns the folder.
    """
    import torch

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                torch.manual_seed(0)
                fill(folder)
                done.touch()
        return folder

    return build


def save_published(root: Path) -> None:
    """Tiny repositories in the published layouts, by name."""
    import tiny

    for kind in ("sd1", "sd2", "sdxl"):
        tiny.save_diffusion(root / kind, kind)
    for kind in ("clip", "siglip", "dinov2"):
        tiny.save_vision(root / kind, kind)
    tiny.save_language_model(root / "llm")
    tiny.save_llava(root / "llava")


@pytest.fixture(scope="session")
def published(build_once: BuildOnce) -> dict[str, Path]:
    """Tiny repositories in the published layouts, by name."""
    return {folder.name: folder for folder in build_once("published", save_published).iterdir()}


TOWER = {"taps": ["U-L1-R1-B0-Cross-Q"], "image_size": 64, "grid_size": 4}
"""Tower fields that fit the tiny repositories."""


@pytest.fixture(scope="session")
def composed(published, build_once: BuildOnce) -> Path:
    """A composed checkpoint with its processor: SD 2, CLIP and a Llama, cross-attention at s = 4."""
    import torch

    from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

    def fill(folder: Path) -> None:
        parts = {"diffusion": published["sd2"], "vision": published["clip"], "language_model": published["llm"]}
        fields = {**TOWER, "fusion_num_attention_heads": 4}
        model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts, **fields)
        torch.nn.init.normal_(model.model.fusion.out_proj.weight)  # so that the diffusion features reach the answer
        model.save_pretrained(folder)
        SDLlavaProcessor.from_component_pretrained(**parts, **fields).save_pretrained(folder)

    return build_once("composed", fill)


@pytest.fixture(scope="session")
def smoke_miniature(build_once: BuildOnce) -> Path:
    """The miniature's parts at the smoke scale, which have learnt nothing."""
    from research.miniature.pretrain import pretrain
    from research.miniature.scales import PARTS

    def fill(folder: Path) -> None:
        assert set(pretrain("smoke", folder)) == set(PARTS)

    return build_once("smoke-miniature", fill)


@pytest.fixture(scope="session")
def photographs() -> Path:
    folder = SHARED_DATA / "images"
    if not folder.is_dir():
        pytest.skip("the shared photographs are not here")
    return folder
