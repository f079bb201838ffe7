"""Configurations of the model and of its diffusion tower."""

import math
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .taps import resolve_taps
from .version import CONFIGURATION_VERSION, __version__

AUTO_MAP = {
    "AutoConfig": "configuration.SDLlavaConfig",
    "AutoModel": "modeling_sdllava.SDLlavaModel",
    "AutoModelForImageTextToText": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoModelForVisualQuestionAnswering": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoProcessor": "processors.SDLlavaProcessor",
}
DIFFUSION_AUTO_MAP = {
    "AutoConfig": "configuration.SDLlavaDiffusionConfig",
    "AutoModel": "diffusion.SDLlavaDiffusionModel",
}
CUSTOM_PIPELINES = {
    "visual-question-answering": {
        "impl": "pipeline.VisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
"""What a saved configuration says about the code beside it, for processes where `sdllava` is not installed."""
VERSIONS = {"sdllava_version": __version__, "configuration_version": CONFIGURATION_VERSION}


class VersionedConfig(PreTrainedConfig):
    """A configuration that records which version wrote it, and refuses what a later one wrote."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: a later version of the package wrote it, in a form that this one would misread.
        """
        version = config_dict.get("configuration_version", CONFIGURATION_VERSION)
        if version > CONFIGURATION_VERSION:
            raise ValueError(
                f"this checkpoint's configuration has version {version}, written by sdllava "
                f"{config_dict.get('sdllava_version')}; sdllava {__version__} reads versions up to "
                f"{CONFIGURATION_VERSION}: pip install --upgrade sdllava"
            )
        return super().from_dict(config_dict, **kwargs)


STABLE_DIFFUSION_2_1_BASE: dict[str, dict[str, Any]] = {
    "unet_config": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae_config": {
        "sample_size": 768,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder_config": {
        "model_type": "clip_text_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "vocab_size": 49408,
    },
    "scheduler_config": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    },
}
"""The part of stabilityai/stable-diffusion-2-1-base's configurations that differs from the libraries' defaults."""

PAPER_TAP = "U-L1-R1-B0-Cross-Q"
PAPER_TAP_SDXL = "U-L0-R0-B7-Out"


@strict
class SDLlavaDiffusionConfig(VersionedConfig):
    r"""The frozen diffusion model as a visual encoder: which model, where it is read, how it is asked.

    One general form covers every system of S3 (arXiv 2507.07106) and of S4, its workshop version. With ``X_u`` and
    ``X_c`` the features for the empty and for the given prompt, each guidance scale ``s`` gives
    ``X = X_u + s (X_c - X_u)`` (S3, equation 1): unconditional is ``[0]``, conditional ``[1]``, amplified ``[4]``,
    SDXL-LLaVA-c ``[0, 1]`` with ``ensemble="concat"``.

    Args:
        unet_config, vae_config, text_encoder_config, text_encoder_2_config, scheduler_config (`dict`, *optional*):
            The published configurations of the parts, as in the repository's folders. All default to Stable Diffusion
            2.1-base; `text_encoder_2_config` makes it SDXL. `vae_config` may be an `AutoencoderTiny`'s.
        taps (`list[str]`): where the UNet is read, see [`~sdllava.taps.list_taps`]. Default: the papers' tap,
            `U-L1-R1-B0-Cross-Q`, for SDXL `U-L0-R0-B7-Out`.
        timesteps (`list[int]`): noise levels, 0..999 on the training schedule; larger means more noise.
        guidance_scales (`list[float]`): the scales `s` of the features.
        ensemble (`str`): how several taps, timesteps and scales become one map: `"concat"` on channels, in the order
            tap, timestep, scale; `"mean"`; `"learned"` (softmax weights). The last two need equal channels.
        grid_size (`int`): height and width of the returned map, in tokens.
        image_size (`int`): height and width of the image that the VAE sees, in pixels.
        noise_seed (`int`): seed of the one noise map that evaluation uses for every image, timestep and prompt.
        conditioning (`str`): what the model was made to be asked: `"question"`, `"caption"`, or `"none"`, which keeps
            the prompt empty whatever it is given.
        implicit_caption_tokens (`int`): number of prompt tokens that the implicit captioner makes from the static
            encoder's global image feature (S4, 6.1); 0 turns it off.
        null_input_ids, null_input_ids_2 (`list[int]`, *optional*): the empty prompt as each SD tokenizer pads it.
        truncate (`bool`): cut away whatever lies behind the deepest tap (the VAE's decoder too).
        vae_in_fp32 (`bool`): keep the VAE in float32 when the model is loaded in half precision.
    """

    model_type = "sdllava_diffusion"
    base_config_key = "diffusion_config"

    unet_config: dict | None = None
    vae_config: dict | None = None
    text_encoder_config: dict | None = None
    text_encoder_2_config: dict | None = None
    scheduler_config: dict | None = None
    taps: list[str] | None = None
    timesteps: list[int] | None = None
    guidance_scales: list[int | float] | None = None
    ensemble: Literal["concat", "mean", "learned"] = "concat"
    grid_size: int = 16
    image_size: int = 512
    noise_seed: int = 0
    conditioning: Literal["question", "caption", "none"] = "question"
    implicit_caption_tokens: int = 0
    null_input_ids: list[int] | None = None
    null_input_ids_2: list[int] | None = None
    truncate: bool = True
    vae_in_fp32: bool = True

    def __post_init__(self, **kwargs):
        for name, default in STABLE_DIFFUSION_2_1_BASE.items():
            if getattr(self, name) is None:
                setattr(self, name, dict(default))
        if self.taps is None:
            self.taps = [PAPER_TAP if self.text_encoder_2_config is None else PAPER_TAP_SDXL]
        self.timesteps = [50] if self.timesteps is None else self.timesteps
        self.guidance_scales = [4.0] if self.guidance_scales is None else [float(s) for s in self.guidance_scales]
        if self.null_input_ids is None:
            self.null_input_ids = [49406, 49407] + [0] * 75
        if self.text_encoder_2_config is not None and self.null_input_ids_2 is None:
            self.null_input_ids_2 = [49406, 49407] + [0] * 75
        self._check()
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), **VERSIONS, "auto_map": DIFFUSION_AUTO_MAP}

    def _check(self):
        self.resolved_taps()
        if not (self.taps and self.timesteps and self.guidance_scales):
            raise ValueError("taps, timesteps and guidance_scales need at least one entry each")
        if not all(math.isfinite(scale) for scale in self.guidance_scales):
            raise ValueError(f"guidance_scales must be finite numbers, not {self.guidance_scales}")
        if self.grid_size < 1 or self.latent_size < 1:
            raise ValueError(
                f"grid_size={self.grid_size} and image_size={self.image_size} must leave a token and a latent at least"
            )
        if self.conditioning == "none" and self.implicit_caption_tokens:
            raise ValueError("conditioning='none' keeps the prompt empty: leave out implicit_caption_tokens")
        last = self.scheduler_config.get("num_train_timesteps", 1000) - 1
        for timestep in self.timesteps:
            if not 0 <= timestep <= last:
                raise ValueError(f"timestep {timestep} is outside the training schedule: give a value in 0..{last}")
        channels = {tap.channels for tap in self.resolved_taps()}
        if self.ensemble != "concat" and len(channels) > 1:
            raise ValueError(
                f"ensemble={self.ensemble!r} needs taps of equal channels, but {self.taps} have {sorted(channels)}: "
                'choose taps of one width, or ensemble="concat"'
            )

    def resolved_taps(self):
        """The configured taps with module path, height, width and channels (`list[~sdllava.taps.Tap]`)."""
        return resolve_taps(self.taps, self.unet_config, self.latent_size)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.vae_scale_factor

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** (
            len(self.vae_config["encoder_block_out_channels" if self.has_tiny_vae else "block_out_channels"]) - 1
        )

    @property
    def has_tiny_vae(self) -> bool:
        """Whether `vae_config` describes diffusers' `AutoencoderTiny`."""
        return "encoder_block_out_channels" in self.vae_config

    @property
    def raw_channels(self) -> int:
        """Channels of one prompt's features before guidance and ensemble: taps times timesteps, side by side."""
        return sum(tap.channels for tap in self.resolved_taps()) * len(self.timesteps)

    @property
    def hidden_size(self) -> int:
        """Channels of the returned map."""
        if self.ensemble == "concat":
            return self.raw_channels * len(self.guidance_scales)
        return self.resolved_taps()[0].channels


CLIP_VIT_L_14_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
}

_MODELS_WITHOUT_CLS = ("siglip_vision_model", "siglip2_vision_model")


@strict
class SDLlavaConfig(VersionedConfig):
    r"""LLaVA with a diffusion tower. `SDLlavaConfig()` is the papers' model: Stable Diffusion 2.1-base at s = 4, CLIP
    ViT-L/14-336 and Vicuna-7B, fused by cross-attention (S3, 5.2).

    Args:
        text_config, vision_config, diffusion_config: the parts, the papers' where left out. `vision_config` is CLIP's,
            SigLIP's or DINOv2's, `None` for diffusion alone; `diffusion_config=None` is plain LLaVA.
        fusion (`str`): `"cross_attention"`, `"concat"`, `"concat_tokens"`, `"gated"`; `"none"` with one tower.
        fusion_num_attention_heads (`int`): heads of the cross-attention.
        fusion_grid_size (`int`, *optional*): resize the static features to this grid before fusing: 16 is the
            256-query reading of S3, A.2. Default: their own grid (with `concat`, the diffusion grid).
        spatial_merge_size (`int`): join squares of this many by this many tokens on channels before the projector.
        vision_image_size (`int`, *optional*): pixels that the static encoder sees; default its configuration's.
        components (`dict`, *optional*): where each part came from (`id`, `revision`, `license`, `language`), by its
            name in `from_component_pretrained`; recorded by assembly.
        left_out (`dict`, *optional*): the hash of each frozen part that a checkpoint leaves out; set in saved
            configurations only.
        image_token_index, projector_hidden_act, vision_feature_select_strategy, vision_feature_layer,
        multimodal_projector_bias: as in `LlavaConfig`.
    """

    model_type = "sdllava"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "diffusion_config": SubConfigSpec(config_class=SDLlavaDiffusionConfig, optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = field(default_factory=lambda: dict(CLIP_VIT_L_14_336))
    diffusion_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    fusion: Literal["none", "cross_attention", "concat", "concat_tokens", "gated"] | None = None
    fusion_num_attention_heads: int = 16
    fusion_grid_size: int | None = None
    spatial_merge_size: int = 1
    vision_image_size: int | None = None
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    vision_feature_layer: int | list[int] = -2
    multimodal_projector_bias: bool = True
    components: dict | None = None
    left_out: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not type(self).__module__.startswith("transformers_modules"):
            kwargs.pop("custom_pipelines", None)  # where this package is installed, its own pipeline serves
        super().__post_init__(**kwargs)
        if not self.tie_word_embeddings and self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        two_towers = self.vision_config is not None and self.diffusion_config is not None
        if self.fusion is None:
            self.fusion = "cross_attention" if two_towers else "none"
        if self.vision_config is not None and self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if self.vision_has_cls else "full"
        self._check(two_towers)

    def to_diff_dict(self) -> dict[str, Any]:
        fields = {**super().to_diff_dict(), **VERSIONS, "auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        for part in ("text_config", "vision_config"):
            (fields.get(part) or {}).pop("_name_or_path", None)  # `components` says it, and names no local path
        return fields

    def _check(self, two_towers: bool):
        if self.vision_config is None and self.diffusion_config is None:
            raise ValueError("vision_config and diffusion_config are both None: the model needs at least one encoder")
        captioner_alone = two_towers and self.implicit_caption_tokens  # the static encoder only makes the prompt
        if two_towers == (self.fusion == "none") and not captioner_alone:
            towers = "two encoders" if two_towers else "one encoder"
            right = "'cross_attention', 'concat', 'concat_tokens' or 'gated'" if two_towers else "'none'"
            raise ValueError(f"fusion={self.fusion!r} does not fit {towers}: use {right}")
        if self.vision_config is not None and self.vision_feature_select_strategy == "default":
            if not self.vision_has_cls:
                raise ValueError(
                    f"vision_feature_select_strategy='default' drops the CLS token, which "
                    f"{self.vision_config.model_type} has not: use 'full'"
                )
        if self.fusion == "cross_attention" and self.vision_hidden_size % self.fusion_num_attention_heads:
            raise ValueError(
                f"fusion_num_attention_heads={self.fusion_num_attention_heads} does not divide the static encoder's "
                f"width {self.vision_hidden_size}"
            )
        if self.implicit_caption_tokens and self.vision_config is None:
            raise ValueError("implicit_caption_tokens needs a static encoder: give a vision_config")
        if self.spatial_merge_size > 1 and self.fusion == "concat_tokens":
            raise ValueError("spatial_merge_size works on one grid, but concat_tokens joins two: use 1")
        if self.spatial_merge_size > 1 and self.token_grid_size % self.spatial_merge_size:
            raise ValueError(
                f"spatial_merge_size={self.spatial_merge_size} does not divide the {self.token_grid_size} x "
                f"{self.token_grid_size} grid of image tokens"
            )

    @property
    def implicit_caption_tokens(self) -> int:
        return 0 if self.diffusion_config is None else self.diffusion_config.implicit_caption_tokens

    @property
    def reads_static_features(self) -> bool:
        """Whether the static encoder's tokens reach the language model; an implicit captioner may be all it serves."""
        return self.vision_config is not None and (self.diffusion_config is None or self.fusion != "none")

    @property
    def vision_has_cls(self) -> bool:
        """Whether the static encoder's sequence begins with a class token."""
        return self.vision_config.model_type not in _MODELS_WITHOUT_CLS

    @property
    def vision_grid_size(self) -> int:
        """Patches along one side of the static encoder's image."""
        return (self.vision_image_size or self.vision_config.image_size) // self.vision_config.patch_size

    @property
    def vision_interpolates(self) -> bool:
        """Whether the static encoder has to be told to see another size than its own; DINOv2 may always."""
        size = self.vision_image_size
        return size not in (None, self.vision_config.image_size) and self.vision_config.model_type != "dinov2"

    @property
    def vision_hidden_size(self) -> int:
        """Channels of the selected static features, all selected layers side by side."""
        layers = self.vision_feature_layer
        return self.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)

    @property
    def token_grid_size(self) -> int:
        """Tokens along one side of the (fused) feature map, before merging. Raises where the tokens form no square."""
        if not self.reads_static_features:
            return self.diffusion_config.grid_size
        if self.fusion == "concat":
            return self.fusion_grid_size or self.diffusion_config.grid_size
        if self.vision_has_cls and self.vision_feature_select_strategy == "full":
            raise ValueError("with its CLS token kept, the static encoder's sequence is no square grid: use 'default'")
        return self.fusion_grid_size or self.vision_grid_size

    @property
    def fused_hidden_size(self) -> int:
        """Channels that enter the projector, before merging."""
        if not self.reads_static_features:
            return self.diffusion_config.hidden_size
        if self.fusion == "concat":
            return self.vision_hidden_size + self.diffusion_config.hidden_size
        return self.vision_hidden_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of one image: what the processor writes and the model fills."""
        if self.fusion == "none" and self.reads_static_features and self.spatial_merge_size == 1:
            cls = self.vision_has_cls and self.vision_feature_select_strategy == "full"
            return self.vision_grid_size**2 + int(cls)
        tokens = (self.token_grid_size // self.spatial_merge_size) ** 2
        return tokens + self.diffusion_config.grid_size**2 if self.fusion == "concat_tokens" else tokens
