"""The vision-language model: LLaVA's own modules and names, with a diffusion tower and a fusion."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .assembly import load_weights
from .checkpoint_files import FIELD_ERRORS, unexpected_reported
from .configuration import SDLlavaConfig
from .image_model import SDLlavaImageModel, SDLlavaPreTrainedModel
from .outputs import SDLlavaCausalLMOutputWithPast, SDLlavaImageEncodings, SDLlavaModelOutputWithPast
from .parts import Parts, read_llava_parts, read_parts
from .prefix_cache import PrefixCache
from .repositories import as_dtype

IMAGE_INPUTS = (
    "pixel_values",
    "diffusion_pixel_values",
    "diffusion_input_ids",
    "diffusion_input_ids_2",
    "diffusion_input_ids_3",
    "diffusion_noise_seed",
    "image_encodings",
    "diffusion_guidance_scales",
)
"""The inputs of `get_image_features`: what `generate` turns into image features once, before the first token."""
_IMAGES_TWICE = "Both images and mm_encoder_outputs were given. Give one of them."


class NoImageToken(LogitsProcessor):
    """Keeps the image token out of answers, and out of what a prompt lookup proposes."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """The scores `(batch, vocab_size)` with minus infinity for the image token."""
        token = torch.tensor([self.image_token_id], device=scores.device)
        return scores.index_fill(-1, token, float("-inf"))


class SDLlavaModel(SDLlavaImageModel):
    """The image model, and the language model's body."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

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
        diffusion_input_ids_3: torch.Tensor | None = None,
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
                diffusion_input_ids_3, diffusion_noise_seed, image_encodings, diffusion_guidance_scales,
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
        return cls.build(parts).load_parts(parts, dtype)

    @classmethod
    def build(cls, parts: Parts) -> "SDLlavaForConditionalGeneration":
        """A model on the meta device, without weights, for [`load_parts`].

        Args:
            parts: As for [`from_parts`].

        Raises:
            ValueError: The configuration does not fit.
        """
        sources = ", ".join(map(str, parts.sources.values()))
        with unexpected_reported(sources, "the configuration", FIELD_ERRORS), torch.device("meta"):
            return cls(parts.config)

    def load_parts(self, parts: Parts, dtype: torch.dtype) -> "SDLlavaForConditionalGeneration":
        """Fill a model that [`build`] made with the weights of its parts; fusion and projector are initialised.

        Args:
            parts: Those that the model was built from.
            dtype: Of all weights except the VAE's.

        Raises:
            OSError, ValueError: As [`~sdllava.assembly.load_weights`].
        """
        projector = load_weights(self, parts, dtype)
        self.model.build_new_parts(dtype)
        if projector is not None:
            self.model.multi_modal_projector.load_state_dict(projector)
        return self.eval()

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
            ValueError: The stage is unknown.
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
        diffusion_input_ids_3: torch.Tensor | None = None,
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
            diffusion_input_ids_3=diffusion_input_ids_3,
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
    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        prefix_cache: PrefixCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, with the inputs of `get_image_features`, which run once, before decoding.

        Args:
            inputs, generation_config, kwargs: As for `GenerationMixin.generate`.
            prefix_cache: With `fusion="concat_tokens"` and a single prompt, a follow-up question reuses the keys and
                values of the prompt up to the last vision token of its first image. Ignored for batches, beams and
                other fusions, and with `past_key_values`, `cache_implementation` or `use_cache=False`.

        Raises:
            ValueError: As `get_image_features`, or both images and `mm_encoder_outputs` are given.
        """
        image_inputs = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        processors = [*(kwargs.get("logits_processor") or []), NoImageToken(self.config.image_token_id)]
        kwargs["logits_processor"] = LogitsProcessorList(processors)
        given = [image_inputs.get(name) for name in ("pixel_values", "diffusion_pixel_values", "image_encodings")]
        if any(x is not None for x in given):
            if kwargs.get("mm_encoder_outputs") is not None:
                raise ValueError(_IMAGES_TWICE)
            input_ids = kwargs.get("input_ids", inputs)
            if prefix_cache is not None and self._can_continue(input_ids, generation_config, kwargs):
                kwargs |= self._continue_prefix(prefix_cache, input_ids, image_inputs)
            else:
                kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**image_inputs)}
        return super().generate(inputs, generation_config, **kwargs)

    def _can_continue(self, input_ids: torch.Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> bool:
        if not self.config.question_independent_tokens or input_ids is None or len(input_ids) != 1:
            return False
        mask = kwargs.get("attention_mask")
        if kwargs.get("past_key_values") is not None or not (mask is None or bool(mask.all())):
            return False
        settings = {**vars(generation_config or self.generation_config), **kwargs}
        if settings.get("prompt_lookup_num_tokens") or settings.get("assistant_model") is not None:
            return False
        sequences = max(settings.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        return sequences == 1 and not settings.get("cache_implementation") and settings.get("use_cache") is not False

    def _continue_prefix(
        self, prefix_cache: PrefixCache, input_ids: torch.Tensor, image_inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `generate` with which it computes only what comes after the prefix."""
        pixels = [image_inputs.pop(name, None) for name in ("pixel_values", "diffusion_pixel_values")]
        encodings = SDLlavaImageEncodings(**(image_inputs.pop("image_encodings", None) or {}))
        if encodings.vision_features is None:
            encodings = self.encode_images(*pixels)
        vision = self.model.get_vision_tokens(encodings)
        diffusion = self.model.get_diffusion_tokens(encodings, **image_inputs)
        first = int((input_ids[0] == self.config.image_token_id).int().argmax())
        prefix_ids = input_ids[:, : first + vision.shape[1]]
        prefix = prefix_cache.get(prefix_ids, vision[:1])
        if prefix is None:
            outputs = {"image": BaseModelOutputWithPooling(pooler_output=[vision[0]])}
            prefix = self.model(prefix_ids, mm_encoder_outputs=outputs, use_cache=True).past_key_values
            prefix_cache.put(prefix_ids, vision[:1], prefix)
        rest = [diffusion[0], *torch.cat([vision, diffusion], dim=1)[1:]]
        return {
            "past_key_values": prefix,
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=rest)},
        }
