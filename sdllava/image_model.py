"""The model in front of the language model: encoders, fusion and projector, which serving engines use on their own."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .checkpoints import FROZEN_PARTS, CheckpointMixin, fetch_frozen, leave_out_frozen
from .configuration import SDLlavaConfig
from .diffusion import SDLlavaDiffusionModel
from .fusion import AttentionOverMaps, ImplicitCaptioner, SDLlavaMultiModalProjector, build_fusion
from .guidance import ZeroLinear
from .outputs import SDLlavaImageEncodings


class SDLlavaPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """What both models share: saving, loading and initialisation."""

    config: SDLlavaConfig
    config_class = SDLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        # of modules with own weights only: transformers skips the others
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, AttentionOverMaps):
            init.zeros_(module.map_embedding)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; frozen parts that were left out come from their own repositories."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.left_out:
            fetch_frozen(model)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, bundle_frozen: bool = True, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.save_pretrained`, with the code next to it for processes without this package.

        Args:
            save_directory: The folder.
            args, kwargs: As for `PreTrainedModel.save_pretrained`.
            bundle_frozen (`bool`): False leaves out the weights of the frozen diffusion model and vision encoder where
                the configuration records which repository they came from. Loading fetches them from there and
                compares their hash with the recorded one.

        Raises:
            ValueError: `bundle_frozen=False`, and the frozen parts are not those of a recorded repository.
        """
        if bundle_frozen:
            return super().save_pretrained(save_directory, *args, **kwargs)
        hashes, names = leave_out_frozen(self)
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        kept = {name: tensor for name, tensor in state_dict.items() if name not in names}
        self.config.left_out = hashes
        try:
            return super().save_pretrained(save_directory, *args, state_dict=kept, **kwargs)
        finally:
            self.config.left_out = None


class SDLlavaImageModel(SDLlavaPreTrainedModel):
    """Encoders, fusion and projector; towers that the configuration lacks are None."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        diffusion: Any = config.diffusion_config
        self.vision_tower = None if vision is None else AutoModel.from_config(vision)
        self.diffusion_tower = None if diffusion is None else SDLlavaDiffusionModel(diffusion)
        self.fusion = build_fusion(config)
        self.implicit_captioner = ImplicitCaptioner(config) if config.implicit_caption_tokens else None
        self.multi_modal_projector = SDLlavaMultiModalProjector(config)
        self._keys_to_ignore_on_load_missing = [rf"\b{FROZEN_PARTS[part]}\." for part in config.left_out or ()]
        self.freeze()

    def build_new_parts(self, dtype: torch.dtype) -> None:
        """Replace projector, fusion and implicit captioner by initialised ones, which a model on the meta device lacks.

        Args:
            dtype: Of their weights.
        """
        config = self.config
        self.multi_modal_projector = SDLlavaMultiModalProjector(config)
        self.fusion = build_fusion(config)
        self.implicit_captioner = ImplicitCaptioner(config) if config.implicit_caption_tokens else None
        for module in (self.multi_modal_projector, self.fusion, self.implicit_captioner):
            if module is not None:
                module.apply(self._init_weights).to(dtype)

    def freeze(self) -> None:
        """Stop gradients to the vision encoder, which no stage trains."""
        if self.vision_tower is not None:
            self.vision_tower.requires_grad_(False)

    @torch.no_grad()
    def encode_images(
        self,
        pixel_values: torch.Tensor | None = None,
        diffusion_pixel_values: torch.Tensor | None = None,
    ) -> SDLlavaImageEncodings:
        """What does not depend on the question: latents, vision features, unconditional features.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(n, 3, height, width)`): As the vision encoder's processor
                makes them.
            diffusion_pixel_values (`torch.FloatTensor` of shape `(n, 3, image_size, image_size)`): In [-1, 1].

        Raises:
            ValueError: The model has an encoder whose images are missing.
        """
        encodings: dict[str, Any] = {}
        if self.vision_tower is not None:
            encodings["vision_features"], encodings["image_embeds"] = self._vision_features(pixel_values)
        tower = self.diffusion_tower
        if tower is not None:
            if diffusion_pixel_values is None:
                raise ValueError("This model has a diffusion tower. Give diffusion_pixel_values.")
            encodings["latents"] = tower.encode_latents(diffusion_pixel_values)
            if tower.config.needs_unconditional:
                encodings["unconditional_features"] = tower(latents=encodings["latents"]).unconditional_features
        return SDLlavaImageEncodings(**encodings)

    def _vision_features(self, pixel_values: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixel_values is None:
            raise ValueError("This model has a vision encoder. Give pixel_values, or image_encodings.")
        tower: Any = self.vision_tower
        options = {"interpolate_pos_encoding": True} if self.config.vision_interpolates else {}
        outputs = tower(pixel_values.to(tower.dtype), output_hidden_states=True, **options)
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        selected = [outputs.hidden_states[layer][:, first:] for layer in layers]
        features = selected[0] if len(selected) == 1 else torch.cat(selected, dim=-1)
        return features, outputs.pooler_output if self.implicit_captioner is not None else None

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        diffusion_pixel_values: torch.Tensor | None = None,
        diffusion_input_ids: torch.Tensor | None = None,
        diffusion_input_ids_2: torch.Tensor | None = None,
        diffusion_input_ids_3: torch.Tensor | None = None,
        diffusion_noise_seed: torch.Tensor | None = None,
        image_encodings: SDLlavaImageEncodings | None = None,
        diffusion_guidance_scales: Sequence[float] | float | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """Image features as the language model reads them.

        Args:
            pixel_values, diffusion_pixel_values: See `encode_images`; not needed with `image_encodings`.
            diffusion_input_ids, diffusion_input_ids_2, diffusion_input_ids_3 (`torch.LongTensor` of shape
                `(n, tokens)`): The questions on which the diffusion model is conditioned, one per image, by each of its
                tokenizers. Default: the empty prompt.
            diffusion_noise_seed (`torch.LongTensor` of shape `(n,)`): One noise map per image, for training.
            image_encodings: From `encode_images` on the same images; the call then costs one conditional pass.
            diffusion_guidance_scales: As many as configured, instead of the configured ones.
            return_dict: Ignored; for compatibility with transformers.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` is the fused map `(n, tokens, channels)`, `pooler_output`
            a list with a `(num_image_tokens, hidden_size)` tensor for each image.

        Raises:
            ValueError: The images of an encoder are missing, or guidance scales are given without a diffusion tower.
        """
        known = SDLlavaImageEncodings(**(image_encodings or {}))
        if self.vision_tower is not None and known.vision_features is None:
            known.vision_features, known.image_embeds = self._vision_features(pixel_values)
        vision = known.vision_features
        if self.diffusion_tower is None:
            if diffusion_guidance_scales is not None:
                raise ValueError(
                    f"diffusion_guidance_scales={diffusion_guidance_scales} needs a diffusion tower, which this model "
                    "does not have. Leave it out."
                )
            features = vision
        else:
            diffusion = self._diffusion_features(
                known, diffusion_pixel_values, diffusion_input_ids, diffusion_input_ids_2, diffusion_input_ids_3,
                diffusion_noise_seed, diffusion_guidance_scales,
            )  # fmt: skip
            features = diffusion if self.fusion is None else self.fusion(vision, diffusion)
        projected = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(projected))

    def _diffusion_features(
        self,
        known: SDLlavaImageEncodings,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        input_ids_2: torch.Tensor | None,
        input_ids_3: torch.Tensor | None,
        noise_seed: torch.Tensor | None,
        guidance_scales: Sequence[float] | float | None,
    ) -> torch.Tensor:
        """The tower's features `(n, grid_size ** 2, channels)`, where and in which precision the fusion reads them."""
        if pixel_values is None and known.latents is None and known.conditional_features is None:
            raise ValueError("This model has a diffusion tower. Give diffusion_pixel_values, or image_encodings.")
        images = next(x for x in (pixel_values, known.latents, known.conditional_features) if x is not None)
        if known.vision_features is not None and len(images) != len(known.vision_features):
            raise ValueError(
                f"There are {len(known.vision_features)} image(s) for the vision encoder and {len(images)} for the "
                "diffusion model. Give the same images to both."
            )
        tower: Any = self.diffusion_tower
        captioner = self.implicit_captioner
        features = tower(
            pixel_values=pixel_values,
            input_ids=input_ids,
            input_ids_2=input_ids_2,
            input_ids_3=input_ids_3,
            latents=known.latents,
            unconditional_features=known.unconditional_features if noise_seed is None else None,
            conditional_features=known.conditional_features,
            implicit_caption=captioner(known.image_embeds) if captioner is not None else None,
            noise_seed=noise_seed,
            guidance_scales=guidance_scales,
        ).last_hidden_state
        vision = known.vision_features
        like = self.multi_modal_projector.linear_1.weight if vision is None else vision
        device = features.device if like.device.type == "meta" else like.device  # accelerate moves offloaded weights
        return features.to(device, like.dtype)

    def get_vision_tokens(self, image_encodings: SDLlavaImageEncodings) -> torch.Tensor:
        """The image features that do not depend on the question, with `fusion="concat_tokens"`.

        Args:
            image_encodings: From `encode_images`, or only its `vision_features`.

        Returns:
            `torch.FloatTensor` of shape `(n, question_independent_tokens, hidden_size)`.
        """
        fusion: Any = self.fusion
        return self.multi_modal_projector(fusion.vision_tokens(image_encodings.vision_features))

    def get_diffusion_tokens(
        self,
        image_encodings: SDLlavaImageEncodings,
        diffusion_input_ids: torch.Tensor | None = None,
        diffusion_input_ids_2: torch.Tensor | None = None,
        diffusion_input_ids_3: torch.Tensor | None = None,
        diffusion_noise_seed: torch.Tensor | None = None,
        diffusion_guidance_scales: Sequence[float] | float | None = None,
    ) -> torch.Tensor:
        """The image features that depend on the question, with `fusion="concat_tokens"`; they follow the others.

        Args:
            image_encodings: From `encode_images`.
            diffusion_input_ids, diffusion_input_ids_2, diffusion_input_ids_3, diffusion_noise_seed,
                diffusion_guidance_scales: As for `get_image_features`.

        Returns:
            `torch.FloatTensor` of shape `(n, grid_size ** 2, hidden_size)`.
        """
        fusion: Any = self.fusion
        diffusion = self._diffusion_features(
            image_encodings, None, diffusion_input_ids, diffusion_input_ids_2, diffusion_input_ids_3,
            diffusion_noise_seed, diffusion_guidance_scales,
        )  # fmt: skip
        return self.multi_modal_projector(fusion.diffusion_tokens(diffusion))
