"""The miniature diffusion transformer, in Stable Diffusion 3's layout, to ask whether captions leak there, too.

A stock transformer with joint attention over image and text tokens, trained with rectified flow on the latents of the
miniature's VAE and on prompts of the text encoder that the UNet uses.
"""

import copy
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdllava.atomic_files import atomic_path
from sdllava.scenes.language import caption
from sdllava.scenes.world import sample_scene
from sdllava.sd3 import T5_LENGTH

from .images import to_pixels
from .loop import mixed_precision, scene_numbers
from .text import clip_tokenizer
from .unet import LATENT_SIZE, close_up, prompt_for

PATCH = 4
TOKENS = 60
"""Tokens of a prompt. The longest caption has 65, one in three thousand more than 60."""
CLOSE_UP_TOKENS = 20
SHIFT = 3.0
_SECOND_WIDTH = 8
_QUESTION_SHARE = 0.2
_LAYOUT_MEAN = 2.0
_TEXT_WEIGHT = 0.007
_BATCH = 64


def transformer_config(width: int, layers: int, heads: int, text_width: int) -> dict[str, Any]:
    """Stable Diffusion 3's layout with 64 image tokens of 4 x 4 latents.

    Args:
        width: Channels, a multiple of `heads`.
        layers: Joint blocks.
        heads: Attention heads.
        text_width: Channels of the first text encoder.
    """
    return {
        "sample_size": LATENT_SIZE,
        "patch_size": PATCH,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "joint_attention_dim": text_width + _SECOND_WIDTH,
        "caption_projection_dim": width,
        "pooled_projection_dim": text_width + _SECOND_WIDTH,
        "pos_embed_max_size": LATENT_SIZE // PATCH,
        "qk_norm": "rms_norm",
    }


def build_transformer(config: dict[str, Any]) -> SD3Transformer2DModel:
    """A transformer whose blocks and output are zero at first, as in DiT (arXiv 2212.09748, section 3.2).

    The text encoder's second-last layer is not normalised: its values have a standard deviation of 13. The weights that
    read it are therefore smaller.
    """
    transformer = SD3Transformer2DModel(**config)
    nn.init.normal_(transformer.context_embedder.weight, std=_TEXT_WEIGHT)
    nn.init.zeros_(transformer.context_embedder.bias)
    zeroed = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def text_encoders(trained: CLIPTextModel) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The two text encoders of the layout.

    Stable Diffusion 3 reads the second-last layer, so the first encoder is the trained one with one more layer, which
    is the identity. The second one gives zeros.

    Args:
        trained: The miniature's text encoder.
    """
    config = copy.deepcopy(trained.config)
    config.num_hidden_layers += 1
    config.projection_dim = config.hidden_size
    first = CLIPTextModelWithProjection(config)
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in trained.state_dict().items()}
    first.load_state_dict(weights, strict=False)
    last = first.text_model.encoder.layers[-1]
    small = config.to_dict() | {
        "hidden_size": _SECOND_WIDTH,
        "intermediate_size": _SECOND_WIDTH,
        "projection_dim": _SECOND_WIDTH,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
    }
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(small))
    with torch.no_grad():
        for layer in (last.self_attn.out_proj, last.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        first.text_projection.weight.copy_(torch.eye(config.hidden_size))
        for parameter in second.parameters():
            parameter.zero_()
    return first.eval(), second.eval()


class KeyBias(TorchFunctionMode):
    """Adds a bias to the attention logits of a transformer's blocks while it is active.

    Args:
        biases: The bias `(queries or 1, keys)` of each block, in their order, or one for all blocks.
    """

    def __init__(self, *biases: Tensor | None):
        super().__init__()
        self.biases, self.calls = biases, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            bias = self.biases[self.calls % len(self.biases)]
            self.calls += 1
            return func(*args, **kwargs | {"attn_mask": bias})
        return func(*args, **kwargs)


def zero_row_bias(image_tokens: int, text_tokens: int) -> Tensor:
    """The bias `(1, keys)` with which one zero row of text stands for the 256 that take T5's place.

    Equal tokens stay equal in every block, so an attention over all of them is one over a single token whose logit is
    larger by the logarithm of their number.
    """
    bias = torch.zeros(1, image_tokens + text_tokens + 1)
    bias[:, -1] = math.log(T5_LENGTH)
    return bias


class StoredLatents:
    """Latents of the first training scenes and of their close-ups, computed once and kept in a file.

    Args:
        vae: The trained VAE.
        count: The number of scenes. Training reads them again and again.
        file: The file. Latents that are there are loaded.
    """

    def __init__(self, vae: AutoencoderKL, count: int, file: Path):
        self.count = count
        if not file.exists():
            with atomic_path(file) as written:
                save_file({"latents": _encode(vae, count)}, written)
        self.latents = load_file(file)["latents"]
        if len(self.latents) != count:
            raise ValueError(f"{str(file)!r} has {len(self.latents)} scenes instead of {count}. Delete it.")

    def __getitem__(self, numbers: list[int]) -> Tensor:
        return self.latents[numbers].float()


@torch.no_grad()
def _encode(vae: AutoencoderKL, count: int) -> Tensor:
    found = []
    for start in tqdm(range(0, count, _BATCH), desc="latents"):
        pixels = to_pixels([sample_scene("train", k) for k in range(start, min(start + _BATCH, count))])
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        found.append((vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).half())
    return torch.cat(found).contiguous()


class MmditPart:
    """Trains the transformer on the stored latents of scenes, conditioned on their prompts.

    The first steps use close-ups of single objects, which have a quarter of the tokens.

    Args:
        vae: The trained VAE, which is frozen.
        text_encoder: The trained text encoder, which is frozen.
        transformer: The transformer, which is trained.
        steps: The steps of the budget.
        latents: The stored latents.
        close_ups: The share of the steps that use close-ups.
        seed: Selects scenes, prompts and noise.
    """

    name = "mmdit"
    folder = "mmdit"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        transformer: SD3Transformer2DModel,
        steps: int,
        latents: StoredLatents,
        close_ups: float = 2 / 11,
        seed: int = 0,
    ):
        self.steps, self.seed, self.latents, self.close_ups = steps, seed, latents, close_ups
        self.vae = vae.requires_grad_(False)
        self.transformer = transformer
        self.encoders = [encoder.requires_grad_(False) for encoder in text_encoders(text_encoder)]
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = clip_tokenizer(folder, pad_token="!")
        self.tokenizer.model_max_length = TOKENS
        self.model = nn.ModuleDict({"transformer": transformer})
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        return self.transformer.device

    def encode_prompts(self, prompts: list[str], length: int = TOKENS) -> dict[str, Tensor]:
        """Prompts as the transformer's inputs, with one zero row in place of T5's 256.

        Args:
            prompts: The prompts.
            length: Tokens to which they are padded or cut.

        Returns:
            `dict[str, Tensor]`: "encoder_hidden_states" `(n, length + 1, width)`, "pooled_projections" `(n, width)`.
        """
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(prompts, **options).input_ids
        with torch.no_grad():
            read = self.encoders[0](ids, output_hidden_states=True)
        tokens = F.pad(read.hidden_states[-2], (0, _SECOND_WIDTH, 0, 1))
        pooled = F.pad(read.text_embeds, (0, _SECOND_WIDTH))
        return {"encoder_hidden_states": tokens.to(self.device), "pooled_projections": pooled.to(self.device)}

    def predict(self, noisy: Tensor, sigmas: Tensor, prompts: dict[str, Tensor]) -> Tensor:
        """The velocity at noise levels `sigmas` `(n,)` for prompts of [`encode_prompts`]."""
        rows = noisy.shape[-1] * noisy.shape[-2] // PATCH**2
        bias = zero_row_bias(rows, prompts["encoder_hidden_states"].shape[1] - 1).to(noisy.device)
        with KeyBias(bias):
            return self.transformer(noisy, timestep=1000 * sigmas, **prompts).sample

    def _batch(self, step: int, batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents of this step's close-ups or scenes, and their prompts."""
        numbers = scene_numbers(self.seed, step, batch_size)
        rows = [number % self.latents.count for number in numbers]
        scenes, latents = [sample_scene("train", row) for row in rows], self.latents[rows]
        draws = [random.Random(f"prompt {number}") for number in numbers]
        if step >= self.close_ups * self.steps:
            prompts = [prompt_for(scene, rng, _QUESTION_SHARE) for scene, rng in zip(scenes, draws, strict=True)]
            return latents, self.encode_prompts(prompts)
        pairs = [close_up(*one) for one in zip(scenes, latents, draws, strict=True)]
        described = self.encode_prompts([prompt for _, prompt in pairs], CLOSE_UP_TOKENS)
        return torch.stack([quadrant for quadrant, _ in pairs]), described

    def _sigmas(self, n: int) -> Tensor:
        """Noise levels: logit-normal as in Stable Diffusion 3, every second one around 0.88.

        The layout of an image is decided at high noise levels. At a standard normal logit only 1% are above 0.9.
        """
        return torch.sigmoid(torch.randn(n) + _LAYOUT_MEAN * (torch.arange(n) % 2))

    def _error(self, latents: Tensor, prompts: dict[str, Tensor], sigmas: Tensor) -> Tensor:
        latents, sigmas = latents.to(self.device), sigmas.to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        at = sigmas.view(-1, 1, 1, 1)
        with mixed_precision(self.device):
            predicted = self.predict((1 - at) * latents + at * noise, sigmas, prompts)
        return F.mse_loss(predicted.float(), noise - latents)

    def loss(self, step: int, batch_size: int) -> Tensor:
        """The error of the velocity on this step's images, at random noise levels."""
        return self._error(*self._batch(step, batch_size), self._sigmas(batch_size))

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """The error on held-out scenes.

        Returns:
            `dict[str, float]`: "error", and "wrong_caption_ratio": the error at sigma = 0.95 with another scene's
            caption, divided by the error with the scene's own.
        """
        scenes = [sample_scene("validation", number) for number in range(count)]
        latents = self.vae.encode(to_pixels(scenes)).latent_dist.mode() * self.vae.config.scaling_factor
        captions = [caption(scene) for scene in scenes]

        def error(prompts: list[str], sigmas: Tensor) -> float:
            torch.manual_seed(0)
            return self._error(latents, self.encode_prompts(prompts), sigmas).item()

        noisy = torch.full((count,), 0.95)
        wrong = error(captions[1:] + captions[:1], noisy)
        torch.manual_seed(1)
        return {"error": error(captions, self._sigmas(count)), "wrong_caption_ratio": wrong / error(captions, noisy)}

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The parts as a pipeline, to sample and to save the published layout."""
        first, second = self.encoders
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=self.vae,
            text_encoder=first,
            tokenizer=self.tokenizer,
            text_encoder_2=second,
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )

    @torch.no_grad()
    def sample(self, prompts: list[str], steps: int = 25, guidance: float = 3.0, seed: int = 0) -> Tensor:
        """Sample one image per prompt.

        Args:
            prompts: The prompts.
            steps: Denoising steps.
            guidance: The scale of classifier-free guidance.
            seed: Selects the initial noise.

        Returns:
            `torch.Tensor`: Images `(n, 3, 64, 64)` in [-1, 1].
        """
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        given, empty = self.encode_prompts(prompts), self.encode_prompts([""] * len(prompts))
        noise = torch.randn(
            len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(seed)
        ).to(self.device)
        with KeyBias(zero_row_bias((LATENT_SIZE // PATCH) ** 2, TOKENS).to(self.device)):
            latents = pipeline(
                prompt_embeds=given["encoder_hidden_states"],
                pooled_prompt_embeds=given["pooled_projections"],
                negative_prompt_embeds=empty["encoder_hidden_states"],
                negative_pooled_prompt_embeds=empty["pooled_projections"],
                latents=noise,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
        return self.vae.decode(latents.cpu() / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def write(self, folder: str | Path) -> None:
        """Write `mmdit/` in diffusers' layout."""
        self.pipeline().save_pretrained(Path(folder) / self.folder)
