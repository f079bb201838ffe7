"""The vision-language model: LLaVA's own modules and names, with a diffusion tower and a fusion."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .assembly import load_weights
from .checkpoints import FROZEN_PARTS, CheckpointMixin, fetch_frozen, leave_out_frozen
from .configuration import SDLlavaConfig
from .diffusion import SDLlavaDiffusionModel
from .fusion import AttentionOverMaps, ImplicitCaptioner, SDLlavaMultiModalProjector, build_fusion
from .guidance import ZeroLinear
from .outputs import SDLlavaCausalLMOutputWithPast, SDLlavaImageEncodings, SDLlavaModelOutputWithPast
from .parts import Parts, read_llava_parts, read_parts
from .repositories import as_dtype

IMAGE_INPUTS = (
    "pixel_values",
    "diffusion_pixel_values",
    "diffusion_input_ids",
    "diffusion_input_ids_2",
    "diffusion_noise_seed",
    "image_encodings",
    "diffusion_guidance_scales",
)
"""The inputs of `get_image_features`: what `generate` turns into image features once, before the first token."""
_IMAGES_TWICE = "Both images and mm_encoder_outputs were given. Give one of them."


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


class SDLlavaModel(SDLlavaPreTrainedModel):
    """Encoders, fusion, projector and the language model's body; towers that the configuration lacks are None."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        diffusion: Any = config.diffusion_config
        self.vision_tower = None if vision is None else AutoModel.from_config(vision)
        self.diffusion_tower = None if diffusion is None else SDLlavaDiffusionModel(diffusion)
        self.fusion = build_fusion(config)
        self.implicit_captioner = ImplicitCaptioner(config) if config.implicit_caption_tokens else None
        self.multi_modal_projector = SDLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._keys_to_ignore_on_load_missing = [rf"\b{FROZEN_PARTS[part]}\." for part in config.left_out or ()]
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Stop gradients to the vision encoder, which no stage trains."""
        if self.vision_tower is not None:
            self.vision_tower.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

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
            if any(s != 1 for s in tower.config.guidance_scales) or tower.config.conditioning == "none":
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
        diffusion_noise_seed: torch.Tensor | None = None,
        image_encodings: SDLlavaImageEncodings | None = None,
        diffusion_guidance_scales: Sequence[float] | float | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """Image features as the language model reads them.

        Args:
            pixel_values, diffusion_pixel_values: See `encode_images`; not needed with `image_encodings`.
            diffusion_input_ids, diffusion_input_ids_2 (`torch.LongTensor` of shape `(n, 77)`): The questions on which
                the diffusion model is conditioned, one per image. Default: the empty prompt.
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
        vision, image_embeds = known.vision_features, known.image_embeds
        if self.vision_tower is not None and vision is None:
            vision, image_embeds = self._vision_features(pixel_values)
        tower, captioner = self.diffusion_tower, self.implicit_captioner
        if tower is None:
            if diffusion_guidance_scales is not None:
                raise ValueError(
                    f"diffusion_guidance_scales={diffusion_guidance_scales} needs a diffusion tower, which this model "
                    "does not have. Leave it out."
                )
            features = vision
        else:
            if diffusion_pixel_values is None and known.latents is None and known.conditional_features is None:
                raise ValueError("This model has a diffusion tower. Give diffusion_pixel_values, or image_encodings.")
            diffusion = tower(
                pixel_values=diffusion_pixel_values,
                input_ids=diffusion_input_ids,
                input_ids_2=diffusion_input_ids_2,
                latents=known.latents,
                unconditional_features=known.unconditional_features if diffusion_noise_seed is None else None,
                conditional_features=known.conditional_features,
                implicit_caption=captioner(image_embeds) if captioner is not None else None,
                noise_seed=diffusion_noise_seed,
                guidance_scales=diffusion_guidance_scales,
            ).last_hidden_state
            like = self.multi_modal_projector.linear_1.weight if vision is None else vision
            diffusion = diffusion.to(like.device, like.dtype)
            features = diffusion if self.fusion is None else self.fusion(vision, diffusion)
        projected = self.multi_modal_projector(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=list(projected))

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where image features go, a mask of shape `(batch, sequence, 1)`.

        Raises:
            ValueError: Placeholders and image features differ in number.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        torch_compilable_check(
            mask.sum() == image_features.shape[0],
            lambda: (
                f"The text holds {int(mask.sum())} image placeholders, but the images give {image_features.shape[0]} "
                f"features ({self.config.num_image_tokens} per image). Use this model's own processor, or leave the "
                "images out where the cache holds them."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        diffusion_pixel_values: torch.Tensor | None = None,
        diffusion_input_ids: torch.Tensor | None = None,
        diffusion_input_ids_2: torch.Tensor | None = None,
        diffusion_noise_seed: torch.Tensor | None = None,
        image_encodings: SDLlavaImageEncodings | None = None,
        diffusion_guidance_scales: Sequence[float] | float | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> SDLlavaModelOutputWithPast:
        """As `LlavaModel.forward`, with the diffusion inputs of `get_image_features`.

        Args:
            mm_encoder_outputs: `{"image": ...}` from `get_image_features`, instead of the image inputs.

        Raises:
            ValueError: Inputs are missing or given twice.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "none" if input_ids is None else "both"
            raise ValueError(f"Give exactly one of input_ids and inputs_embeds, not {given}.")
        if self.training and torch.is_grad_enabled() and self.config.is_trained is False:
            self.config.is_trained = True
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        has_images = any(x is not None for x in (pixel_values, diffusion_pixel_values, image_encodings))
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is not None and has_images:
            raise ValueError(_IMAGES_TWICE)
        if has_images:
            image_outputs = self.get_image_features(
                pixel_values, diffusion_pixel_values, diffusion_input_ids, diffusion_input_ids_2,
                diffusion_noise_seed, image_encodings, diffusion_guidance_scales,
            )  # fmt: skip
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return SDLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class SDLlavaForConditionalGeneration(SDLlavaPreTrainedModel, GenerationMixin):
    """The vision-language model with its language-modelling head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SDLlavaConfig):
        super().__init__(config)
        self.model = SDLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    @classmethod
    def from_parts(cls, parts: Parts, dtype: torch.dtype | str = torch.float32) -> "SDLlavaForConditionalGeneration":
        """Load published parts whose configurations have been read; fusion and projector are new and need training.

        Args:
            parts: From [`~sdllava.parts.read_parts`] or [`~sdllava.parts.read_llava_parts`].
            dtype (`torch.dtype` or `str`): Of all weights except the VAE's.

        Raises:
            OSError, ValueError: As [`~sdllava.assembly.load_weights`].
        """
        dtype = as_dtype(dtype)
        with torch.device("meta"):
            model = cls(parts.config)
        load_weights(model, parts, dtype)
        return model

    @classmethod
    def from_component_pretrained(
        cls,
        diffusion: str | None = None,
        vision: str | None = None,
        language_model: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        **config: Any,
    ) -> "SDLlavaForConditionalGeneration":
        """Put published parts together; see [`~sdllava.parts.read_parts`] and [`from_parts`]."""
        return cls.from_parts(read_parts(diffusion, vision, language_model, **config), dtype)

    @classmethod
    def from_llava_pretrained(
        cls, llava: str, diffusion: str | None = None, dtype: torch.dtype | str = torch.float32, **config: Any
    ) -> "SDLlavaForConditionalGeneration":
        """Upgrade a LLaVA-1.5 checkpoint; see [`~sdllava.parts.read_llava_parts`] and [`from_parts`]."""
        return cls.from_parts(read_llava_parts(llava, diffusion, **config), dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-modelling head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the language-modelling head."""
        self.lm_head = new_embeddings

    def encode_images(
        self, pixel_values: torch.Tensor | None = None, diffusion_pixel_values: torch.Tensor | None = None
    ) -> SDLlavaImageEncodings:
        """See [`SDLlavaModel.encode_images`]."""
        return self.model.encode_images(pixel_values, diffusion_pixel_values)

    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`SDLlavaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def set_stage(self, stage: Literal["align", "finetune"]) -> None:
        """Set what trains (S3, 5.2).

        Args:
            stage: In `"align"` the projector, the fusion, the implicit captioner and learned ensemble weights train;
                in `"finetune"` the language model as well. Encoders stay frozen.

        Raises:
            ValueError: There is no such stage.
        """
        if stage not in ("align", "finetune"):
            raise ValueError(f"There is no stage {stage!r}. Use 'align' or 'finetune'.")
        self.requires_grad_(False)
        trained = [self.model.multi_modal_projector, self.model.fusion, self.model.implicit_captioner]
        if self.model.diffusion_tower is not None:
            trained.append(self.model.diffusion_tower.ensemble)
        if stage == "finetune":
            trained += [self.model.language_model, self.lm_head]
        for module in trained:
            if module is not None:
                module.requires_grad_(True)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        diffusion_pixel_values: torch.Tensor | None = None,
        diffusion_input_ids: torch.Tensor | None = None,
        diffusion_input_ids_2: torch.Tensor | None = None,
        diffusion_noise_seed: torch.Tensor | None = None,
        image_encodings: SDLlavaImageEncodings | None = None,
        diffusion_guidance_scales: Sequence[float] | float | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> SDLlavaCausalLMOutputWithPast:
        """As `LlavaForConditionalGeneration.forward`, with the diffusion inputs of `get_image_features`.

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`): -100 where nothing is predicted.
            logits_to_keep: The last that many positions, or those indexed; 0 keeps all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            diffusion_pixel_values=diffusion_pixel_values,
            diffusion_input_ids=diffusion_input_ids,
            diffusion_input_ids_2=diffusion_input_ids_2,
            diffusion_noise_seed=diffusion_noise_seed,
            image_encodings=image_encodings,
            diffusion_guidance_scales=diffusion_guidance_scales,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return SDLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @torch.no_grad()
    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, with the inputs of `get_image_features`, which run once, before decoding.

        Raises:
            ValueError: As `get_image_features`, or both images and `mm_encoder_outputs` are given.
        """
        image_inputs = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        given = [image_inputs.get(name) for name in ("pixel_values", "diffusion_pixel_values", "image_encodings")]
        if any(x is not None for x in given):
            if kwargs.get("mm_encoder_outputs") is not None:
                raise ValueError(_IMAGES_TWICE)
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**image_inputs)}
        return super().generate(inputs, generation_config, **kwargs)
