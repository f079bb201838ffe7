"""Fixtures that many tests share: tiny published repositories, built once a run."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; the workers share the cores
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, Path]:
    """Tiny repositories in the published layouts, by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("published")
    folders = {kind: tiny.save_diffusion(root / kind, kind) for kind in ("sd1", "sd2", "sdxl")}
    folders |= {kind: tiny.save_vision(root / kind, kind) for kind in ("clip", "siglip", "dinov2")}
    folders["llm"] = tiny.save_language_model(root / "llm")
    folders["llava"] = tiny.save_llava(root / "llava")
    return folders


TOWER = {"taps": ["U-L1-R1-B0-Cross-Q"], "image_size": 64, "grid_size": 4}
"""Tower fields that fit the tiny repositories."""


@pytest.fixture(scope="session")
def composed(published, tmp_path_factory) -> Path:
    """A composed checkpoint with its processor: SD 2, CLIP and a Llama, cross-attention at s = 4."""
    from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

    torch.manual_seed(0)
    parts = {"diffusion": published["sd2"], "vision": published["clip"], "language_model": published["llm"]}
    fields = {**TOWER, "fusion_num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("composed")
    model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts, **fields)
    torch.nn.init.normal_(model.model.fusion.out_proj.weight)  # so that the diffusion features reach the answer
    model.save_pretrained(folder)
    SDLlavaProcessor.from_component_pretrained(**parts, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smoke_miniature(tmp_path_factory) -> Path:
    """The miniature's parts at the smoke scale, which have learnt nothing."""
    from research.miniature.pretrain import pretrain
    from research.miniature.scales import PARTS

    folder = tmp_path_factory.mktemp("miniature")
    assert set(pretrain("smoke", folder)) == set(PARTS)
    return folder


@pytest.fixture(scope="session")
def photographs() -> Path:
    folder = SHARED_DATA / "images"
    if not folder.is_dir():
        pytest.skip("the shared photographs are not here")
    return folder
