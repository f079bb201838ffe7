"""The configuration of the diffusion tower, and the versions that saved configurations record."""

import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .families import DiffusionFamily, PartConfigs, find_family
from .taps import Tap, resolve_taps
from .version import CONFIGURATION_VERSION, __version__

DIFFUSION_AUTO_MAP = {
    "AutoConfig": "configuration.SDLlavaDiffusionConfig",
    "AutoModel": "diffusion.SDLlavaDiffusionModel",
}
VERSIONS = {"sdllava_version": __version__, "configuration_version": CONFIGURATION_VERSION}

PART_FIELDS = (
    "unet_config",
    "transformer_config",
    "vae_config",
    "text_encoder_config",
    "text_encoder_2_config",
    "text_encoder_3_config",
    "scheduler_config",
)
EMPTY_CLIP_PROMPT = [49406, 49407] + [0] * 75
"""The empty prompt as Stable Diffusion 2.x pads it to CLIP's 77 tokens."""


class VersionedConfig(PreTrainedConfig):
    """A configuration that records which version wrote it, and rejects what a later version wrote."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: A later version of the package wrote it, in a form that this one would misread.
        """
        version = config_dict.get("configuration_version", CONFIGURATION_VERSION)
        if version > CONFIGURATION_VERSION:
            raise ValueError(
                f"Configuration version {version}, written by sdllava {config_dict.get('sdllava_version')}, is newer "
                f"than {CONFIGURATION_VERSION}, which sdllava {__version__} reads. Run `pip install --upgrade sdllava`."
            )
        return super().from_dict(config_dict, **kwargs)


@strict
class SDLlavaDiffusionConfig(VersionedConfig):
    r"""The frozen diffusion model as a vision encoder: which model, where it is read, how it is conditioned.

    One general form covers every system of S3 (arXiv 2507.07106) and of S4, its workshop version. With ``X_u`` and
    ``X_c`` the features for the empty and for the given prompt, each guidance scale ``s`` gives
    ``X = X_u + s (X_c - X_u)`` (S3, equation 1): unconditional is ``[0]``, conditional ``[1]``, amplified ``[4]``,
    SDXL-LLaVA-c ``[0, 1]`` with ``ensemble="concat"``.

    Args:
        unet_config, transformer_config, vae_config, text_encoder_config, text_encoder_2_config, text_encoder_3_config,
            scheduler_config (`dict`, *optional*): The published configurations of the parts, as in the repository's
            folders. All default to Stable Diffusion 2.1-base. `addition_embed_type="text_time"` in `unet_config` makes
            it SDXL, and the `_class_name` in `transformer_config` names the family of a diffusion transformer.
            `vae_config` may be that of an `AutoencoderTiny`.
        taps (`list[str]`): Where the denoiser is read, see [`~sdllava.taps.list_taps`]. Default: the papers' tap,
            `U-L1-R1-B0-Cross-Q`, for SDXL `U-L0-R0-B7-Out`.
        timesteps (`list[int]`): Noise levels, 0..999 on the training schedule; larger means more noise.
        guidance_scales (`list[float]`): The scales `s` of the features.
        ensemble (`str`): How several taps, timesteps and scales become one map: `"concat"` on channels, in the order
            tap, timestep, scale; `"mean"`; `"learned"` (softmax weights); `"select"` (per token, by a gate that reads
            all maps). The last three need equal channels. A mean over guidance scales is one effective scale.
        ensemble_top_k (`int`, *optional*): With `"select"`, the number of maps that each token keeps. Default: all.
        grid_size (`int`): Height and width of the returned map, in tokens.
        image_size (`int`): Height and width of the image that the VAE encodes, in pixels.
        add_noise (`bool`): False gives the denoiser clean latents, as CleanDIFT's UNets are trained (arXiv 2412.03439);
            the timestep then only enters its embedding.
        noise_seed (`int`): Seed of the one noise map that evaluation uses for every image, timestep and prompt.
        conditioning (`str`): What the model was trained to be conditioned on: `"question"`, `"caption"`, or `"none"`,
            which keeps the prompt empty whatever is given. The first two are a record: inference encodes the prompt
            that it is given, and `sdllava evaluate --diffusion-prompt` chooses which one that is.
        implicit_caption_tokens (`int`): Number of prompt tokens that the implicit captioner computes from the vision
            encoder's global image feature (S4, introduction); 0 turns it off.
        null_input_ids, null_input_ids_2, null_input_ids_3 (`list[int]`, *optional*): The empty prompt as each
            tokenizer pads it.
        use_t5 (`bool`): False leaves out Stable Diffusion 3's T5 encoder, 4.8 billion parameters; its part of the
            prompt is then zero, as in the published pipeline without it.
        distilled_guidance (`float`): The guidance scale that FLUX.1-dev reads as an input, in both halves.
        truncate (`bool`): Cut away whatever comes after the last tap, and the VAE's decoder.
        vae_in_fp32 (`bool`): Keep the VAE in float32 when the model is loaded in half precision.

    Raises:
        ValueError: A tap does not exist, a timestep is outside the schedule, or fields contradict each other.
    """

    model_type = "sdllava_diffusion"
    base_config_key = "diffusion_config"

    unet_config: dict | None = None
    transformer_config: dict | None = None
    vae_config: dict | None = None
    text_encoder_config: dict | None = None
    text_encoder_2_config: dict | None = None
    text_encoder_3_config: dict | None = None
    scheduler_config: dict | None = None
    taps: list[str] | None = None
    timesteps: list[int] = field(default_factory=lambda: [50])
    guidance_scales: list[int | float] = field(default_factory=lambda: [4.0])
    ensemble: Literal["concat", "mean", "learned", "select"] = "concat"
    ensemble_top_k: int | None = None
    grid_size: int = 16
    image_size: int = 512
    add_noise: bool = True
    noise_seed: int = 0
    conditioning: Literal["question", "caption", "none"] = "question"
    implicit_caption_tokens: int = 0
    null_input_ids: list[int] = field(default_factory=lambda: list(EMPTY_CLIP_PROMPT))
    null_input_ids_2: list[int] | None = None
    null_input_ids_3: list[int] | None = None
    use_t5: bool = True
    distilled_guidance: float = 3.5
    truncate: bool = True
    vae_in_fp32: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, default in self.family.default_parts.items():
            if getattr(self, name) is None:
                setattr(self, name, dict(default))
        if self.taps is None:
            self.taps = [self.family.default_tap]
        self.guidance_scales = [float(s) for s in self.guidance_scales]
        if len(self.family.tokenizers) > 1 and self.null_input_ids_2 is None:
            self.null_input_ids_2 = list(EMPTY_CLIP_PROMPT)
        if not self.use_t5:
            self.text_encoder_3_config = self.null_input_ids_3 = None
        self._check()
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_diff_dict`, with the versions that wrote it and the code that loads it."""
        return {**super().to_diff_dict(), **VERSIONS, "auto_map": DIFFUSION_AUTO_MAP}

    def _check(self) -> None:
        if not (self.taps and self.timesteps and self.guidance_scales):
            raise ValueError(
                f"taps={self.taps}, timesteps={self.timesteps} and guidance_scales={self.guidance_scales} need at "
                "least one entry each."
            )
        if self.image_size % (patch := self.family.patch_size(self.part_configs)):
            raise ValueError(
                f"image_size={self.image_size} is not a whole number of patches of {patch} pixels. Use a multiple of "
                f"{patch}."
            )
        largest = self.family.max_image_size(self.part_configs)
        if largest is not None and self.image_size > largest:
            raise ValueError(
                f"image_size={self.image_size} is larger than the {largest} pixels that this model has positions for. "
                "Use a smaller image_size."
            )
        self._check_text_encoders()
        taps = self.resolved_taps()
        if not all(math.isfinite(scale) for scale in self.guidance_scales):
            raise ValueError(f"guidance_scales={self.guidance_scales} must be finite numbers.")
        if self.grid_size < 1 or self.latent_size < 1:
            raise ValueError(
                f"grid_size={self.grid_size} and image_size={self.image_size} must leave at least one token and one "
                "latent. Use larger values."
            )
        if self.conditioning == "none" and self.implicit_caption_tokens:
            raise ValueError(
                f"conditioning='none' keeps the prompt empty. Leave out implicit_caption_tokens="
                f"{self.implicit_caption_tokens}, or use conditioning='question'."
            )
        last = self.family.train_timesteps(self.part_configs) - 1
        for timestep in self.timesteps:
            if not 0 <= timestep <= last:
                raise ValueError(f"Timestep {timestep} is outside the training schedule. Use a value in 0..{last}.")
        channels = {tap.channels for tap in taps}
        if self.ensemble != "concat" and len(channels) > 1:
            raise ValueError(
                f"ensemble={self.ensemble!r} needs taps of equal channels, but {self.taps} have {sorted(channels)}. "
                'Choose taps of one width, or ensemble="concat".'
            )

        if self.ensemble_top_k is not None and not (
            self.ensemble == "select" and 1 <= self.ensemble_top_k <= self.num_maps
        ):
            raise ValueError(
                f"ensemble_top_k={self.ensemble_top_k} needs ensemble='select' and has at most {self.num_maps} maps to "
                f"keep. Use 1 to {self.num_maps}, or leave it out."
            )

    def _check_text_encoders(self) -> None:
        family = self.family
        has_second, needs_second = self.text_encoder_2_config is not None, len(family.tokenizers) > 1
        if has_second != needs_second:
            raise ValueError(
                f"text_encoder_2_config is {'given' if has_second else 'None'}, but the family {family.name!r} has "
                f"{len(family.tokenizers)} text encoder(s). {'Give it.' if needs_second else 'Leave it out.'}"
            )
        if not self.use_t5 and not family.can_leave_out_t5:
            raise ValueError(
                f"use_t5=False only fits Stable Diffusion 3, not the family {family.name!r}. Leave it out."
            )
        if self.use_t5 and family.can_leave_out_t5 and self.text_encoder_3_config is None:
            raise ValueError(
                "text_encoder_3_config=None: this Stable Diffusion 3 has no T5 encoder. Set use_t5=False to use it "
                "without, or give a repository that has text_encoder_3 and tokenizer_3."
            )

    @property
    def null_prompt_ids(self) -> list[list[int]]:
        """The empty prompt as each of the model's tokenizers pads it, in their order."""
        ids = (self.null_input_ids, self.null_input_ids_2, self.null_input_ids_3)
        return [row for row in ids if row is not None]

    @property
    def part_configs(self) -> PartConfigs:
        """The published configurations of the diffusion model's parts, by field."""
        return {name: getattr(self, name) for name in PART_FIELDS}

    @property
    def family(self) -> DiffusionFamily:
        """The diffusion family that the parts' configurations describe."""
        return find_family(self.part_configs)

    def all_taps(self) -> list[Tap]:
        """Every tap of the denoiser at this image size, in the order of its forward pass."""
        return self.family.list_taps(self.part_configs, self.latent_size)

    def resolved_taps(self) -> list[Tap]:
        """The configured taps with module path, height, width and channels."""
        return resolve_taps(self.taps or [], self.all_taps())

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.family.latent_scale(self.part_configs)

    @property
    def prompt_width(self) -> int:
        """Channels of a prompt's tokens as the denoiser reads them."""
        return self.family.prompt_width(self.part_configs)

    @property
    def raw_channels(self) -> int:
        """Channels of one prompt's features before guidance and ensemble: taps times timesteps, concatenated."""
        return sum(tap.channels for tap in self.resolved_taps()) * len(self.timesteps)

    @property
    def needs_unconditional(self) -> bool:
        """Whether the features of the empty prompt are read: a guidance scale is not 1, or questions are not read."""
        return any(scale != 1 for scale in self.guidance_scales) or self.conditioning == "none"

    @property
    def num_maps(self) -> int:
        """Maps that the ensemble combines: taps times timesteps times guidance scales."""
        return len(self.taps or []) * len(self.timesteps) * len(self.guidance_scales)

    @property
    def hidden_size(self) -> int:
        """Channels of the returned map."""
        if self.ensemble == "concat":
            return self.raw_channels * len(self.guidance_scales)
        return self.resolved_taps()[0].channels
