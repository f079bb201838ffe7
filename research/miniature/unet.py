"""The small text-conditional UNet, in the block layout of Stable Diffusion 2.

It is trained twice: first to predict the noise, which gives good features, then to predict the velocity, which makes it
follow its prompt. The noise target hardly depends on the image's content at high noise levels. With only the velocity
target, the features take many more steps to become as good.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdllava.scenes.language import ask, caption, describe
from sdllava.scenes.render import SIZE
from sdllava.scenes.world import CELLS, Scene, sample_scene

from .images import to_pixels
from .loop import mixed_precision, scene_numbers
from .text import clip_tokenizer

LATENT_SIZE = SIZE // 2
_NULL_SHARE, _QUESTION_SHARE = 0.12, 0.3


def unet_config(channels: tuple[int, int, int, int], text_width: int) -> dict[str, Any]:
    """Stable Diffusion 2's layout, without self-attention on the largest grid, where it is costly.

    Args:
        channels: Channels of each level, multiples of 8.
        text_width: Channels of the text encoder.
    """
    return {
        "sample_size": LATENT_SIZE,
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": tuple(max(1, width // 32) for width in channels),  # the number of heads, as published
        "cross_attention_dim": text_width,
        "only_cross_attention": (True, False, False, False),
        "use_linear_projection": True,
        "norm_num_groups": 8,
    }


def noise_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise schedule.

    Stable Diffusion's last timestep keeps 7% of the image's amplitude, enough to read a scene's layout in training,
    but sampling starts without it. For the velocity the schedule therefore ends in pure noise (arXiv 2305.08891).

    Args:
        prediction_type: What the UNet predicts: the noise ("epsilon") or the velocity ("v_prediction").
    """
    velocity = prediction_type == "v_prediction"
    return DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=velocity,
        timestep_spacing="trailing" if velocity else "leading",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def prompt_for(scene: Scene, rng: random.Random, questions: float = _QUESTION_SHARE) -> str:
    """The prompt with which a scene is trained: its caption, a question about it (30%), or an empty prompt (12%).

    Questions are the UNet's prompts when it is used as a vision encoder. Without training on their words, it treats
    them as noise. Empty prompts are the unconditional half of guidance.

    Args:
        scene: The scene.
        rng: Selects the prompt.
        questions: The share of questions.
    """
    share = rng.random()
    if share < _NULL_SHARE:
        return ""
    question = ask(scene, rng) if share < _NULL_SHARE + questions else None
    return question.text if question else caption(scene)


def close_up(scene: Scene, image: Tensor, rng: random.Random) -> tuple[Tensor, str]:
    """The quadrant `(channels, size / 2, size / 2)` of one object, and its description or an empty prompt (12%).

    Args:
        scene: The scene.
        image: Its pixels or latents `(channels, size, size)`.
        rng: Selects the object.
    """
    item = rng.choice(scene.objects)
    row, column = divmod(CELLS.index(item.cell), 2)
    half = image.shape[-1] // 2
    quadrant = image[:, half * row : half * (row + 1), half * column : half * (column + 1)]
    return quadrant, describe(item) if rng.random() >= _NULL_SHARE else ""


class DenoiserPart:
    """Trains the UNet to predict the noise on the latents of scenes, conditioned on their prompts.

    The first steps use close-ups of single objects, which cost a third.

    Args:
        vae: The trained VAE, which is frozen.
        text_encoder: The trained text encoder, which is frozen.
        unet: The UNet, which is trained.
        steps: The steps of the budget.
        seed: Selects scenes, prompts and noise.
    """

    name = "denoiser"
    folder = "denoiser"
    prediction_type = "epsilon"
    close_ups_until = 0.5625  # of the budget

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, steps: int, seed: int = 0
    ):
        self.steps, self.seed = steps, seed
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = clip_tokenizer(folder, pad_token="!")
        self.vae, self.text_encoder, self.unet = vae.requires_grad_(False), text_encoder.requires_grad_(False), unet
        self.unet.set_attn_processor(AttnProcessor())  # at these sizes twice as fast on a CPU as the fused kernel
        self.model = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae})
        self.scheduler = noise_scheduler(self.prediction_type)

    def _encode_prompts(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.unet.device)).last_hidden_state

    def _batch(self, step: int, batch_size: int) -> tuple[Tensor, list[str]]:
        """The pixels of this step's close-ups or scenes, and their prompts."""
        numbers = scene_numbers(self.seed, step, batch_size)
        scenes = [sample_scene("train", number) for number in numbers]
        draws = [random.Random(f"prompt {number}") for number in numbers]
        pixels = to_pixels(scenes)
        if step >= self.close_ups_until * self.steps:
            return pixels, [prompt_for(scene, rng) for scene, rng in zip(scenes, draws, strict=True)]
        pairs = [close_up(*one) for one in zip(scenes, pixels, draws, strict=True)]
        return torch.stack([quadrant for quadrant, _ in pairs]), [prompt for _, prompt in pairs]

    def _timesteps(self, n: int) -> Tensor:
        return torch.randint(0, self.scheduler.config.num_train_timesteps, (n,))

    def _error(self, pixels: Tensor, prompts: list[str], timesteps: Tensor) -> Tensor:
        """The mean squared error of the prediction for images `(n, 3, height, width)` with newly drawn noise."""
        pixels, timesteps = pixels.to(self.unet.device), timesteps.to(self.unet.device)
        with mixed_precision(pixels.device):
            with torch.no_grad():
                latents = self.vae.encode(pixels).latent_dist.mode().float() * self.vae.config.scaling_factor
            noise = torch.randn(latents.shape).to(latents.device)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            predicted = self.unet(noisy, timesteps, self._encode_prompts(prompts)).sample
        velocity = self.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return nn.functional.mse_loss(predicted.float(), target)

    def loss(self, step: int, batch_size: int) -> Tensor:
        """The error on this step's images, at random timesteps."""
        return self._error(*self._batch(step, batch_size), self._timesteps(batch_size))

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """The error on held-out scenes.

        Returns:
            `dict[str, float]`: "error", and "wrong_caption_ratio": the error at t = 800 with another scene's caption,
            divided by the error with the scene's own.
        """
        scenes = [sample_scene("validation", number) for number in range(count)]
        pixels, captions = to_pixels(scenes), [caption(scene) for scene in scenes]

        def error(prompts: list[str], timesteps: Tensor | None = None) -> float:
            torch.manual_seed(0)
            return self._error(pixels, prompts, self._timesteps(count) if timesteps is None else timesteps).item()

        very_noisy = torch.full((count,), 800)
        wrong = error(captions[1:] + captions[:1], very_noisy)
        return {"error": error(captions), "wrong_caption_ratio": wrong / error(captions, very_noisy)}

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts as a pipeline, to sample and to save the published layout."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
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
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt"
        )
        return drawn.images.float() * 2 - 1

    def write(self, folder: str | Path) -> None:
        """Write `denoiser/`, or `diffusion/` for the finished UNet, in diffusers' layout."""
        self.pipeline().save_pretrained(Path(folder) / self.folder)


class UnetPart(DenoiserPart):
    """Trains the denoiser's UNet further, on whole scenes, with the velocity as target, like Stable Diffusion 2.1.

    Every second timestep is the later of two draws, and every fourth is from the last tenth of the schedule, because
    the layout of an image is decided at high noise levels.
    """

    name = "unet"
    folder = "diffusion"
    prediction_type = "v_prediction"
    close_ups_until = 0.0

    def _timesteps(self, n: int) -> Tensor:
        first, second, number = super()._timesteps(n), super()._timesteps(n), torch.arange(n)
        last_tenth = self.scheduler.config.num_train_timesteps * 9 // 10 + second // 10
        later = torch.where(number % 2 == 0, torch.maximum(first, second), first)
        return torch.where(number % 4 == 1, last_tenth, later)
