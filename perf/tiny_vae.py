"""A tiny autoencoder instead of the VAE: the time that it saves, and the change of the features.

    python perf/tiny_vae.py MODEL TINY_VAE image.jpg ...

MODEL is an sdllava checkpoint or a diffusers repository. TINY_VAE is a diffusers `AutoencoderTiny`, for example
`madebyollin/taesd` (for SDXL `madebyollin/taesdxl`). The change of the features is only meaningful with real weights.
"""

from pathlib import Path

import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Device, DType, Output, Repeats

from sdllava import SDLlavaDiffusionModel
from sdllava.image_loading import load_rgb
from sdllava.parts import diffusion_image_processor


def load_tower(model: str, dtype: torch.dtype) -> SDLlavaDiffusionModel:
    """Loads the diffusion tower of an sdllava checkpoint, or builds one around a diffusers repository."""
    if Path(model, "model_index.json").exists() or not Path(model).is_dir():
        return SDLlavaDiffusionModel.from_component_pretrained(model, truncate=True, dtype=dtype)
    return SDLlavaDiffusionModel.from_pretrained(model, dtype=dtype)


def main(
    model: str,
    tiny_vae: str,
    images: list[Path],
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Measures the time of both encoders on the images, and the difference between the resulting features."""
    bench = Bench("tiny autoencoder", "given", device, dtype, repeats, output, images=len(images))
    tower = load_tower(model, bench.dtype).to(bench.device).eval()
    process = diffusion_image_processor(tower.config)
    pixels = torch.stack([process(load_rgb(str(path)), return_tensors="pt")["pixel_values"][0] for path in images])
    calls = {"VAE encoder": lambda: tower.encode_latents(pixels)}
    with torch.inference_mode():
        bench.time(calls, per_call=len(images))
        latents = tower.encode_latents(pixels)
        expected = tower(latents=latents).last_hidden_state.float()
        tower.use_tiny_vae(tiny_vae)
        calls = {"tiny autoencoder's encoder": lambda: tower.encode_latents(pixels)}
        (row,) = bench.time(calls, reference="VAE encoder", per_call=len(images)).values()
        features = tower(latents=tower.encode_latents(pixels)).last_hidden_state.float()
        cosine = torch.cosine_similarity(features, expected, dim=-1).mean()
        error = (features - expected).norm() / expected.norm()
        row.note = f"unconditional features: relative difference {error:.3f}, cosine {cosine:.3f}"
    bench.report()


if __name__ == "__main__":
    typer.run(main)
