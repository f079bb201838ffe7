"""The small text-conditional UNet, in the block layout of Stable Diffusion 2.

It is trained twice: a denoiser learns to see, then learns on with the velocity as target, which teaches it to heed its
prompt. The error of predicted noise tells next to nothing of what a very noisy image should show; from the velocity
alone, the features take far longer to tell as much of the image.
"""

import random
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdllava.scenes.dataset import SIZE, Scene, ask, caption, sample_scene
from sdllava.scenes.language import describe
from sdllava.scenes.world import CELLS

from .images import to_pixels
from .loop import mixed_precision, scene_numbers
from .text import clip_tokenizer

LATENT_SIZE = SIZE // 2
_NULL_SHARE, _QUESTION_SHARE = 0.12, 0.3


def unet_config(channels: tuple[int, int, int, int], text_width: int) -> dict:
    """Stable Diffusion 2's layout, but the largest grid attends to the text alone, as its self-attention is costly."""
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
    """Stable Diffusion's noise schedule; what a UNet predicts is the noise ("epsilon") or "v_prediction".

    A velocity's schedule ends in noise alone (arXiv 2305.08891). Stable Diffusion's own leaves 7% of the image's
    amplitude there, enough to tell a scene's layout: training would read it there, and sampling has to do without.
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


def prompt_for(scene: Scene, rng: random.Random) -> str:
    """What the scene is trained with: mostly its caption, at times a question on it, at times nothing.

    Questions, because that is what the UNet will be asked as a visual encoder: one that never saw their words takes
    them for noise. Nothing, so that guidance has an unconditional half to start from.
    """
    share = rng.random()
    if share < _NULL_SHARE:
        return ""
    question = ask(scene, rng) if share < _NULL_SHARE + _QUESTION_SHARE else None
    return question.text if question else caption(scene)


def close_up(scene: Scene, pixels: Tensor, rng: random.Random) -> tuple[Tensor, str]:
    """The quadrant (3, 32, 32) of one object, and its description or, at times, nothing."""
    item = rng.choice(scene.objects)
    row, column = divmod(CELLS.index(item.cell), 2)
    half = SIZE // 2
    quadrant = pixels[:, half * row : half * (row + 1), half * column : half * (column + 1)]
    return quadrant, describe(item) if rng.random() >= _NULL_SHARE else ""


class DenoiserPart:
    """Learns to take noise off the latents of scenes, told their prompts.

    The VAE and the text encoder are trained before, and frozen. Close-ups come first, as a step on them costs a third.
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
        self.unet.set_attn_processor(AttnProcessor())  # on a CPU twice as fast as the fused kernel, at these sizes
        self.model = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae})
        self.scheduler = noise_scheduler(self.prediction_type)

    def _encode_prompts(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.unet.device)).last_hidden_state

    def _batch(self, step: int, batch_size: int) -> tuple[Tensor, list[str]]:
        """Pixels of this step's close-ups or scenes, and their prompts."""
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
        """Mean squared error of what is predicted of images (n, 3, height, width) under fresh noise."""
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
        """The error on held-out scenes, and how many times it grows at t = 800 when told the next scene's caption."""
        scenes = [sample_scene("validation", number) for number in range(count)]
        pixels, captions = to_pixels(scenes), [caption(scene) for scene in scenes]

        def error(told: list[str], timesteps: Tensor | None = None) -> float:
            torch.manual_seed(0)
            return self._error(pixels, told, self._timesteps(count) if timesteps is None else timesteps).item()

        very_noisy = torch.full((count,), 800)
        wrong = error(captions[1:] + captions[:1], very_noisy)
        return {"error": error(captions), "wrong_caption_ratio": wrong / error(captions, very_noisy)}

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts as a pipeline, which samples and which saves the published layout."""
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
        """Samples of the prompts (n, 3, 64, 64) in [-1, 1]."""
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        drawn = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="pt"
        )
        return drawn.images.float() * 2 - 1

    def write(self, folder: str | Path) -> None:
        """Writes `denoiser/`, or `diffusion/` when all is learnt, in diffusers' layout."""
        self.pipeline().save_pretrained(Path(folder) / self.folder)


class UnetPart(DenoiserPart):
    """Learns on from the denoiser, on whole scenes, with the velocity as target, as Stable Diffusion 2.1's.

    Every other timestep is the later of two draws, and every fourth one of the last tenth: what an image shows, and
    where, is decided where most of it is noise.
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
