"""Feature extraction at the papers' tap, compared with stock diffusers.

Reference (a) caches nothing: for each question it runs CLIP, the VAE encoder, the text encoder on both prompts, and the
whole UNet on both halves with a forward hook. Reference (b) caches the tensors that do not depend on the question, and
runs the whole UNet.

    python perf/features.py                                    # SD 2.1-base, full size
    python perf/features.py --model sdxl --batch 1 --batch 32
"""

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import models
import torch
import typer
from diffusers import UNet2DConditionModel
from measure import (
    DEFAULT_DEVICE,
    DEFAULT_DTYPE,
    Bench,
    Call,
    Device,
    DType,
    Output,
    Repeats,
    Size,
    batches,
    difference,
    tokens_on_grid,
)

from sdllava import SDLlavaDiffusionModel
from sdllava.guidance import guide


class Part(StrEnum):
    """What to measure."""

    unet = "unet"
    guided = "guided"
    encoder = "encoder"
    question = "question"
    compiled = "compiled"
    exact = "exact"
    levers = "levers"


class Subject:
    """One diffusion model: the stock modules, and our truncated tower around the same weights.

    Args:
        model (`str`): `"sd15"`, `"sd21"` or `"sdxl"`.
        size (`str`): `"full"` or `"mini"`.
        device (`torch.device`): Device of the weights.
        dtype (`torch.dtype`): Dtype of the weights.
        batch (`int`): Number of images.
    """

    def __init__(self, model: str, size: str, device: torch.device, dtype: torch.dtype, batch: int):
        self.stock = models.build_tower(model, size, device, dtype, truncate=False)
        self.stock_unet = self._stock_unet(self.stock, dtype)
        self.ours = self._truncated(self.stock)
        self.vision = models.build_vision(size, device, dtype)
        self.set_batch(batch)

    @staticmethod
    def _stock_unet(tower: SDLlavaDiffusionModel, dtype: torch.dtype) -> UNet2DConditionModel:
        """Diffusers' UNet around the tower's weights, or around copies of them in another dtype."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(tower.config.unet_config))
        unet.load_state_dict({name: x.to(dtype) for name, x in tower.backbone.unet.state_dict().items()}, assign=True)
        return unet.eval()

    @staticmethod
    def _truncated(stock: SDLlavaDiffusionModel) -> SDLlavaDiffusionModel:
        config = type(stock.config).from_dict({**stock.config.to_dict(), "truncate": True})
        with torch.device("meta"):
            ours = SDLlavaDiffusionModel(config)
        weights, unet = stock.backbone.unet.state_dict(), ours.backbone.unet
        unet.load_state_dict({name: weights[name] for name in unet.state_dict()}, assign=True)
        ours.freeze()
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if hasattr(stock.backbone, name):
                setattr(ours.backbone, name, getattr(stock.backbone, name))
        return ours.eval()

    def compiled_copy(self, **options: Any) -> SDLlavaDiffusionModel:
        """Our tower around the same weights, with a UNet pass compiled with options of `torch.compile`."""
        compiled = self._truncated(self.stock)
        compiled.compile_pass(**options)
        return compiled

    def plain_copy(self) -> SDLlavaDiffusionModel:
        """Our tower around the stock UNet, whose convolutions are torch's. It stops at the same tap."""
        plain = self._truncated(self.stock)
        plain.backbone.unet = self.stock_unet
        return plain

    def set_batch(self, n: int) -> None:
        """Draws `n` random images, latents and prompts."""
        config, weight = self.stock.config, self.stock.backbone.unet.conv_in.weight
        draw = torch.Generator().manual_seed(0)
        size, clip_size = config.image_size, self.vision.config.image_size
        self.pixels = torch.rand(n, 3, size, size, generator=draw).mul(2).sub(1).to(weight)
        self.clip_pixels = torch.randn(n, 3, clip_size, clip_size, generator=draw).to(weight)
        ids = torch.randint(1000, 40000, (n, 77), generator=draw)
        ids[:, 0], ids[:, 20:] = config.null_input_ids[0], config.null_input_ids[1]
        self.ids = ids.to(weight.device)
        null = [ids for ids in (config.null_input_ids, config.null_input_ids_2) if ids is not None]
        self.null_ids = [torch.tensor([row], device=weight.device).expand(n, -1) for row in null]
        self.latents = torch.randn(n, 4, config.latent_size, config.latent_size, generator=draw).to(weight.device)
        self.n = n

    def own_ids(self) -> dict[str, torch.Tensor]:
        """The questions' token ids of shape `(n, 77)`, by argument name."""
        names = ["input_ids", "input_ids_2"][: len(self.null_ids)]
        return dict.fromkeys(names, self.ids)

    def hooked_unet(
        self,
        latents: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        unet: UNet2DConditionModel | None = None,
    ) -> torch.Tensor:
        """Runs a whole UNet with a forward hook at the tap.

        Args:
            latents (`torch.Tensor` of shape `(n, 4, h, w)`): Latents without noise.
            prompts (`dict[str, torch.Tensor]`): Conditioning of n or of a multiple of n prompts.
            unet (`UNet2DConditionModel`, *optional*): The UNet; default the stock one.
        """
        tower, unet = self.stock, unet or self.stock_unet
        (tap,) = tower.taps
        noisy = tower.add_noise(latents, 50, tower.noise(latents))
        noisy = noisy.repeat(len(prompts["encoder_hidden_states"]) // len(latents), 1, 1, 1)
        read: list[Any] = []
        hook = unet.get_submodule(tap.module_path).register_forward_hook(lambda m, args, out: read.append(out))
        tower.backbone.denoise(unet, noisy, 50, prompts)
        hook.remove()
        return read[0]

    def stock_question(self) -> torch.Tensor:
        """Runs reference (a)."""
        self.vision(self.clip_pixels, output_hidden_states=True)
        tower = self.stock
        vae = tower.backbone.vae
        latents = (vae.encode(self.pixels).latent_dist.mode() * vae.config.scaling_factor).float()
        both = [torch.cat([null, self.ids]) for null in self.null_ids]
        unconditional, conditional = self.hooked_unet(latents, tower.backbone.encode_prompts(*both)).chunk(2)
        return guide(unconditional, conditional, 4.0)

    def errors(self) -> dict[str, str]:
        """Differences of guided features from those in float64: of the whole stock UNet, and of ours."""
        null = self.ours.encode_prompts(*self.null_ids)
        both = {name: torch.cat([null[name], x]) for name, x in prompts_of(self, halves=1).items()}
        read = {
            "float64": self.hooked_unet(self.latents, both, self._stock_unet(self.stock, torch.float64)),
            "whole stock UNet": self.hooked_unet(self.latents, both),
            "ours": self.ours.extract(self.latents, both),
        }
        guided = {}
        for name, features in read.items():
            unconditional, conditional = tokens_on_grid(features, self.ours.config.grid_size).double().chunk(2)
            guided[name] = unconditional + 4.0 * (conditional - unconditional)
        expected = guided.pop("float64")
        return {name: difference(found, expected) for name, found in guided.items()}

    def stock_follow_up(self) -> torch.Tensor:
        """Runs reference (b): latents, CLIP features and unconditional features are cached."""
        prompts = self.stock.backbone.encode_prompts(*self.own_ids().values())
        return self.hooked_unet(self.latents, prompts)

    def our_question(self) -> torch.Tensor:
        """Runs a first question with our tower: CLIP, VAE, both prompts, the UNet up to its tap."""
        self.vision(self.clip_pixels, output_hidden_states=True)
        return self.ours(self.pixels, **self.own_ids()).last_hidden_state

    def our_follow_up(self) -> Call:
        """A follow-up question with our tower, with cached latents and unconditional features."""
        cached = self.ours(latents=self.latents).unconditional_features
        return lambda: self.ours(latents=self.latents, unconditional_features=cached, **self.own_ids())


def prompts_of(subject: Subject, halves: int) -> dict[str, torch.Tensor]:
    """The questions' conditioning, once or twice (both halves of the guidance)."""
    prompts = subject.ours.encode_prompts(*subject.own_ids().values())
    return {name: torch.cat([x] * halves) for name, x in prompts.items()}


def unet_calls(subject: Subject, halves: int) -> dict[str, Call]:
    """The UNet's pass on one prompt or on both halves of the guidance: stock and whole, and ours."""
    tower, n, prompts = subject.ours, subject.n, prompts_of(subject, halves)
    what = "one prompt" if halves == 1 else "both halves"
    return {
        f"UNet, {what}, whole with a hook, batch {n}": lambda: subject.hooked_unet(subject.latents, prompts),
        f"UNet, {what}, ours, batch {n}": lambda: tower.extract(subject.latents, prompts),
    }


def time_compiled(bench: Bench, subject: Subject, backend: str) -> None:
    """Adds the rows of both halves with our tower, uncompiled and compiled, on a GPU also with CUDA graphs."""
    ways: dict[str, dict[str, Any]] = {"compiled": {"backend": backend}}
    if bench.device.type == "cuda":
        ways["compiled with CUDA graphs"] = {"mode": "reduce-overhead"}
    prompts, n = prompts_of(subject, halves=2), subject.n
    towers = {"ours": subject.ours, **{name: subject.compiled_copy(**options) for name, options in ways.items()}}
    bench.console.print("compiling and warming up", style="dim")
    found = {name: tower.extract(subject.latents, prompts).clone() for name, tower in towers.items()}
    calls: dict[str, Call] = {
        f"UNet, both halves, {name}, batch {n}": partial(tower.extract, subject.latents, prompts)
        for name, tower in towers.items()
    }
    for name, row in zip(towers, bench.time(calls, per_call=n).values(), strict=True):
        row.note = "" if name == "ours" else difference(found[name], found["ours"])


def lever_calls(subject: Subject) -> list[dict[str, Call]]:
    """Pairs of plain torch and ours: the UNet's convolutions of small maps, and the VAE encoder's memory format."""
    tower, n, prompts = subject.ours, subject.n, prompts_of(subject, halves=1)
    plain, pixels = subject.plain_copy(), subject.pixels
    return [
        {
            f"UNet, to the tap, torch's convolutions, batch {n}": lambda: plain.extract(subject.latents, prompts),
            f"UNet, to the tap, small maps multiplied, batch {n}": lambda: tower.extract(subject.latents, prompts),
        },
        {
            f"VAE encoder, contiguous, batch {n}": lambda: tower.backbone.vae.encode(pixels),
            f"VAE encoder, ours, batch {n}": lambda: tower.encode_latents(pixels),
        },
    ]


def encoder_calls(subject: Subject, size: str) -> dict[str, Call]:
    """The VAE's encoder and a tiny autoencoder's."""
    vae, pixels = subject.stock.backbone.vae, subject.pixels
    tiny = models.build_tiny_vae(size, pixels.device, pixels.dtype)
    return {
        f"VAE encoder, batch {subject.n}": lambda: vae.encode(pixels),
        f"tiny autoencoder's encoder, batch {subject.n}": lambda: tiny.encode(pixels),
    }


def question_calls(subject: Subject) -> dict[str, Call]:
    """Whole questions: reference (a) and ours; with cached image features, reference (b) and ours."""
    n = subject.n
    return {
        f"first question, (a) nothing cached, batch {n}": subject.stock_question,
        f"first question, ours, batch {n}": subject.our_question,
        f"follow-up question, (b) whole UNet, batch {n}": subject.stock_follow_up,
        f"follow-up question, ours, batch {n}": subject.our_follow_up(),
    }


def main(
    model: Annotated[str, typer.Option(help="sd15, sd21 or sdxl.")] = "sd21",
    part: Annotated[
        list[Part] | None, typer.Option(help="What to measure; default unet, guided, encoder, question.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images per batch; default 1, on a GPU 1 to 32.")
    ] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 5,
    output: Output = None,
    compile_backend: Annotated[str, typer.Option(help="Of `torch.compile`.")] = "inductor",
) -> None:
    """Measures the UNet, the encoders and whole questions, compared with stock diffusers."""
    parts = part or [Part.unet, Part.guided, Part.encoder, Part.question]
    title = f"features, {model}, {size}"
    bench = Bench(title, size, device, dtype, repeats, output, model=model, parts=list(parts))
    sizes = batches(batch, 32 if bench.device.type == "cuda" else 1)
    subject = Subject(model, size, bench.device, bench.dtype, sizes[0])
    with torch.inference_mode():
        for n in sizes:
            subject.set_batch(n)
            if Part.unet in parts:
                bench.time(unet_calls(subject, halves=1), per_call=n)
            if Part.guided in parts:
                bench.time(unet_calls(subject, halves=2), per_call=n)
            if Part.encoder in parts:
                bench.time(encoder_calls(subject, size), per_call=n)
            if Part.compiled in parts:
                time_compiled(bench, subject, compile_backend)
            if Part.levers in parts:
                for calls in lever_calls(subject):
                    bench.time(calls, per_call=n)
            if Part.exact in parts:
                for name, error in subject.errors().items():
                    bench.remark(f"guided features at s = 4, batch {n}: {name} {error} from float64")
            if Part.question in parts:
                first, ours, cached, follow_up = bench.time(question_calls(subject), per_call=n).values()
                follow_up.note = f"{cached.median / follow_up.median:.2f}x of (b)"
                expected = tokens_on_grid(bench.results[first.name], subject.ours.config.grid_size)
                ours.note = difference(bench.results[ours.name], expected)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
