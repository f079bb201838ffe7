"""The configuration of the model. That of its diffusion tower is in `diffusion_configuration.py`."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from .diffusion_configuration import VERSIONS, SDLlavaDiffusionConfig, VersionedConfig

AUTO_MAP = {
    "AutoConfig": "configuration.SDLlavaConfig",
    "AutoModel": "modeling_sdllava.SDLlavaModel",
    "AutoModelForImageTextToText": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoModelForVisualQuestionAnswering": "modeling_sdllava.SDLlavaForConditionalGeneration",
    "AutoProcessor": "processors.SDLlavaProcessor",
}
CUSTOM_PIPELINES = {
    "visual-question-answering": {
        "impl": "pipeline.VisualQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
"""What a saved configuration says about the code next to it, for processes where `sdllava` is not installed."""

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
    r"""LLaVA with a diffusion tower.

    `SDLlavaConfig()` is the papers' model: Stable Diffusion 2.1-base at s = 4, CLIP ViT-L/14-336 and Vicuna-7B, fused
    by cross-attention (S3, 5.2).

    Args:
        text_config, vision_config, diffusion_config (`PreTrainedConfig` or `dict`, *optional*): The parts; those of the
            papers where left out. `vision_config` is that of CLIP, SigLIP or DINOv2, or `None` for a model with only
            a diffusion tower; `diffusion_config=None` is plain LLaVA.
        fusion (`str`): `"cross_attention"`, `"concat"`, `"concat_tokens"`, `"gated"`, `"attention_over_maps"` (the
            keys are the tokens of all taps, timesteps and scales), `"multi_level"` (one cross-attention per tap, coarse
            to fine); `"none"` with one tower.
        fusion_num_attention_heads (`int`): Heads of the cross-attention.
        fusion_grid_size (`int`, *optional*): Resize the vision features to this grid before fusing: 16 is the
            256-query reading of S3, A.2. Default: their own grid (with `concat`, the diffusion grid).
        spatial_merge_size (`int`): Join squares of this many by this many tokens on channels before the projector.
        vision_image_size (`int`, *optional*): Pixels along one side of the vision encoder's images. Default: its
            configuration's.
        components (`dict`, *optional*): Where each part came from (`id`, `revision`, `license`, `language`), by its
            name in `from_component_pretrained`; recorded when a model is assembled.
        is_trained (`bool`, *optional*): False for a model that was assembled with a new projector, until its first
            training step. None where it is not recorded.
        left_out (`dict`, *optional*): The hash of each frozen part that a checkpoint leaves out; set in saved
            configurations only.
        image_token_index, projector_hidden_act, vision_feature_select_strategy, vision_feature_layer,
        multimodal_projector_bias: As in `LlavaConfig`.

    Raises:
        ValueError: Fields contradict each other or the parts.
    """

    model_type = "sdllava"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "diffusion_config": SubConfigSpec(config_class=SDLlavaDiffusionConfig, optional=True),
    }
    pipeline_is_registered: ClassVar[bool] = False
    """Set by `registration.register`. The pipeline of the installed package then serves, and the code that a checkpoint
    names for processes without the package is ignored; transformers would ask for `trust_remote_code` otherwise."""

    # dictionaries become configurations in __post_init__
    text_config: Any = None
    vision_config: Any = field(default_factory=lambda: dict(CLIP_VIT_L_14_336))
    diffusion_config: Any = field(default_factory=dict)
    fusion: (
        Literal["none", "cross_attention", "concat", "concat_tokens", "gated", "attention_over_maps", "multi_level"]
        | None
    ) = None
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
    is_trained: bool | None = None
    left_out: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pipeline_is_registered:
            kwargs.pop("custom_pipelines", None)
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
        """As `PreTrainedConfig.to_diff_dict`, with the versions that wrote it and the code that loads it."""
        fields = {**super().to_diff_dict(), **VERSIONS, "auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        for part in ("text_config", "vision_config"):
            (fields.get(part) or {}).pop("_name_or_path", None)  # `components` has it, without local paths
        return fields

    def _check(self, two_towers: bool) -> None:
        if self.vision_config is None and self.diffusion_config is None:
            raise ValueError("vision_config and diffusion_config are both None. The model needs at least one encoder.")
        only_captions = two_towers and self.implicit_caption_tokens  # the vision encoder only makes the prompt
        if two_towers == (self.fusion == "none") and not only_captions:
            towers = "two encoders" if two_towers else "one encoder"
            names = "'cross_attention', 'concat', 'concat_tokens', 'gated', 'attention_over_maps' or 'multi_level'"
            right = names if two_towers else "'none'"
            raise ValueError(f"fusion={self.fusion!r} does not fit {towers}. Use {right}.")
        if self.vision_config is not None:
            self._check_vision_layers()
        drops_cls = self.vision_config is not None and self.vision_feature_select_strategy == "default"
        if drops_cls and not self.vision_has_cls:
            raise ValueError(
                "vision_feature_select_strategy='default' drops the CLS token, which "
                f"{self.vision_config.model_type!r} does not have. Use 'full'."
            )
        if self.fusion in ("attention_over_maps", "multi_level"):
            self._check_maps()
        attends = self.fusion in ("cross_attention", "attention_over_maps", "multi_level")
        if attends and self.vision_hidden_size % self.fusion_num_attention_heads:
            raise ValueError(
                f"fusion_num_attention_heads={self.fusion_num_attention_heads} does not divide the vision encoder's "
                f"width {self.vision_hidden_size}. Choose a divisor."
            )
        if self.implicit_caption_tokens and self.vision_config is None:
            raise ValueError(
                f"implicit_caption_tokens={self.implicit_caption_tokens} needs a vision encoder. Give a vision_config."
            )
        if self.spatial_merge_size > 1 and self.fusion == "concat_tokens":
            raise ValueError(
                f"spatial_merge_size={self.spatial_merge_size} merges one grid, but concat_tokens joins two. Use 1."
            )
        if self.spatial_merge_size > 1 and self.token_grid_size % self.spatial_merge_size:
            raise ValueError(
                f"spatial_merge_size={self.spatial_merge_size} does not divide the {self.token_grid_size} x "
                f"{self.token_grid_size} grid of image tokens. Choose a divisor."
            )

    def _check_vision_layers(self) -> None:
        count = self.vision_config.num_hidden_layers + 1  # with the embeddings
        layers = self.vision_feature_layer
        for layer in layers if isinstance(layers, list) else [layers]:
            if not -count <= layer < count:
                raise ValueError(
                    f"vision_feature_layer={layer} does not exist: the vision encoder has {count - 1} layers. Use a "
                    f"number in {-count}..{count - 1}."
                )

    def _check_maps(self) -> None:
        """Check that the tower returns the maps that the fusion reads, one after the other on channels."""
        tower = self.diffusion_config
        channels = {tap.channels for tap in tower.resolved_taps()}
        if tower.ensemble != "concat" or (self.fusion == "attention_over_maps" and len(channels) > 1):
            raise ValueError(
                f"fusion={self.fusion!r} reads separate maps, but ensemble={tower.ensemble!r} with taps of "
                f"{sorted(channels)} channels. Use ensemble='concat'; attention_over_maps also needs taps of one width."
            )
        if self.fusion == "multi_level" and len({tap.height for tap in tower.resolved_taps()}) < 2:
            raise ValueError(
                f"fusion='multi_level' needs taps of different resolutions, and {tower.taps} have one. Add a tap of "
                "another level."
            )

    @property
    def implicit_caption_tokens(self) -> int:
        """Prompt tokens that the implicit captioner computes; 0 without one."""
        return 0 if self.diffusion_config is None else self.diffusion_config.implicit_caption_tokens

    @property
    def uses_vision_features(self) -> bool:
        """Whether the vision encoder's tokens reach the language model, and not only the implicit captioner."""
        return self.vision_config is not None and (self.diffusion_config is None or self.fusion != "none")

    @property
    def vision_has_cls(self) -> bool:
        """Whether the vision encoder's sequence begins with a class token."""
        return self.vision_config.model_type not in _MODELS_WITHOUT_CLS

    @property
    def vision_grid_size(self) -> int:
        """Patches along one side of the vision encoder's image."""
        return (self.vision_image_size or self.vision_config.image_size) // self.vision_config.patch_size

    @property
    def vision_interpolates(self) -> bool:
        """Whether the vision encoder needs `interpolate_pos_encoding` for this image size; DINOv2 always does it."""
        size = self.vision_image_size
        return size not in (None, self.vision_config.image_size) and self.vision_config.model_type != "dinov2"

    @property
    def vision_hidden_size(self) -> int:
        """Channels of the selected vision features, all selected layers concatenated."""
        layers = self.vision_feature_layer
        return self.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)

    @property
    def token_grid_size(self) -> int:
        """Tokens along one side of the (fused) feature map, before merging.

        Raises:
            ValueError: The tokens are not a square grid, because the class token is kept.
        """
        if not self.uses_vision_features:
            return self.diffusion_config.grid_size
        if self.fusion == "concat":
            return self.fusion_grid_size or self.diffusion_config.grid_size
        if self.vision_has_cls and self.vision_feature_select_strategy == "full":
            raise ValueError(
                "vision_feature_select_strategy='full' keeps the CLS token, so the vision encoder's tokens are not a "
                "square grid. Use 'default'."
            )
        return self.fusion_grid_size or self.vision_grid_size

    @property
    def fused_hidden_size(self) -> int:
        """Channels that enter the projector, before merging."""
        if not self.uses_vision_features:
            return self.diffusion_config.hidden_size
        if self.fusion == "concat":
            return self.vision_hidden_size + self.diffusion_config.hidden_size
        return self.vision_hidden_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens per image: what the processor writes and the model fills."""
        if self.fusion == "none" and self.uses_vision_features and self.spatial_merge_size == 1:
            cls = self.vision_has_cls and self.vision_feature_select_strategy == "full"
            return self.vision_grid_size**2 + int(cls)
        tokens = (self.token_grid_size // self.spatial_merge_size) ** 2
        return tokens + self.diffusion_config.grid_size**2 if self.fusion == "concat_tokens" else tokens

    @property
    def question_independent_tokens(self) -> int:
        """Leading tokens of an image that are equal for every question, although the others depend on it."""
        return self.token_grid_size**2 if self.fusion == "concat_tokens" else 0

    @property
    def depends_on_question(self) -> bool:
        """Whether image features depend on the question, at the configured guidance scales."""
        tower = self.diffusion_config
        return tower is not None and tower.conditioning != "none" and any(tower.guidance_scales)
