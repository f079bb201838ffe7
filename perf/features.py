"""Feature extraction at the papers' tap: ours against stock diffusers as people use it.

The reference (a) runs everything for every question: CLIP, VAE encoder, text encoder on both prompts, and the whole
UNet on both halves, read by a forward hook. The reference (b) keeps per image what does not depend on the question,
but runs the whole UNet.

    python perf/features.py                                    # SD 2.1-base, full size
    python perf/features.py --model sdxl --batch 1 --batch 32
"""

from enum import StrEnum
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
)

from sdllava import SDLlavaDiffusionModel
from sdllava.diffusion import guide
from sdllava.small_maps import SmallMapConv2d


class Part(StrEnum):
    """What can be measured."""

    unet = "unet"
    guided = "guided"
    encoder = "encoder"
    question = "question"
    compiled = "compiled"
    exact = "exact"
    levers = "levers"


class Subject:
    """One diffusion model: stock and whole, and our tower around the same weights, cut."""

    def __init__(self, model: str, size: str, device: torch.device, dtype: torch.dtype, batch: int):
        self.stock = models.build_tower(model, size, device, dtype, truncate=False)
        self.stock_unet = self._stock_unet(self.stock, dtype)
        self.ours = self._cut(self.stock)
        self.vision = models.build_vision(size, device, dtype)
        self.set_batch(batch)

    @staticmethod
    def _stock_unet(tower: SDLlavaDiffusionModel, dtype: torch.dtype) -> UNet2DConditionModel:
        """Diffusers' own UNet around the tower's weights, or around copies of them in another type."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(tower.config.unet_config))
        unet.load_state_dict({name: x.to(dtype) for name, x in tower.unet.state_dict().items()}, assign=True)
        return unet.eval()

    @staticmethod
    def _cut(stock: SDLlavaDiffusionModel) -> SDLlavaDiffusionModel:
        config = type(stock.config).from_dict({**stock.config.to_dict(), "truncate": True})
        with torch.device("meta"):
            ours = SDLlavaDiffusionModel(config)
        weights = stock.unet.state_dict()
        ours.unet.load_state_dict({name: weights[name] for name in ours.unet.state_dict()}, assign=True)
        ours.freeze()
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if hasattr(stock.backbone, name):
                setattr(ours.backbone, name, getattr(stock.backbone, name))
        return ours.eval()

    def compiled_copy(self) -> SDLlavaDiffusionModel:
        """Our tower around the same weights again, its pass compiled."""
        compiled = self._cut(self.stock)
        compiled.compile_pass()
        return compiled

    def set_batch(self, n: int) -> None:
        """Random images, latents and prompts, `n` of each."""
        config, weight = self.stock.config, self.stock.unet.conv_in.weight
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
        """The questions' token ids `(n, 77)`, by the argument's name."""
        names = ["input_ids", "input_ids_2"][: len(self.null_ids)]
        return dict.fromkeys(names, self.ids)

    def hooked_unet(
        self,
        latents: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        unet: UNet2DConditionModel | None = None,
    ) -> torch.Tensor:
        """The whole stock UNet, or another one, with a forward hook at the tap."""
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
        """Reference (a)."""
        self.vision(self.clip_pixels, output_hidden_states=True)
        tower = self.stock
        encoded = tower.vae.encode(self.pixels).latent_dist.mode()
        latents = (encoded * tower.vae.config.scaling_factor).float()
        both = [torch.cat([null, self.ids]) for null in self.null_ids]
        unconditional, conditional = self.hooked_unet(latents, tower.backbone.encode_prompts(*both)).chunk(2)
        return guide(unconditional, conditional, 4.0)

    def errors(self) -> dict[str, str]:
        """How far guided features are from those of float64, of the whole stock UNet and of ours."""
        null = self.ours._null_prompts(self.latents)
        both = {name: torch.cat([null[name], x]) for name, x in prompts_of(self, halves=1).items()}
        read = {
            "float64": self.hooked_unet(self.latents, both, self._stock_unet(self.stock, torch.float64)),
            "whole stock UNet": self.hooked_unet(self.latents, both),
            "ours": self.ours.extract(self.latents, both),
        }
        guided = {}
        for name, features in read.items():
            unconditional, conditional = self.ours._to_grid(features).double().chunk(2)
            guided[name] = unconditional + 4.0 * (conditional - unconditional)
        expected = guided.pop("float64")
        return {name: difference(found, expected) for name, found in guided.items()}

    def stock_follow_up(self) -> torch.Tensor:
        """Reference (b): latents, CLIP and the empty prompt's features are kept."""
        prompts = self.stock.backbone.encode_prompts(*self.own_ids().values())
        return self.hooked_unet(self.latents, prompts)

    def our_question(self) -> torch.Tensor:
        """A first question with our tower: CLIP, VAE, both prompts, the UNet up to its tap."""
        self.vision(self.clip_pixels, output_hidden_states=True)
        return self.ours(self.pixels, **self.own_ids()).last_hidden_state

    def our_follow_up(self) -> Call:
        """A question on an image whose latents and unconditional features are kept."""
        kept = self.ours(latents=self.latents).unconditional_features
        return lambda: self.ours(latents=self.latents, unconditional_features=kept, **self.own_ids())


def prompts_of(subject: Subject, halves: int) -> dict[str, torch.Tensor]:
    """The questions as conditioning, as often as guidance has halves."""
    prompts = subject.ours.encode_prompts(*subject.own_ids().values())
    return {name: torch.cat([x] * halves) for name, x in prompts.items()}


def unet_calls(subject: Subject, halves: int) -> dict[str, Call]:
    """The UNet alone on one prompt or on both halves of the guidance, whole and cut."""
    tower, n, prompts = subject.ours, subject.n, prompts_of(subject, halves)
    what = "one prompt" if halves == 1 else "both halves"
    return {
        f"UNet, {what}, whole with a hook, batch {n}": lambda: subject.hooked_unet(subject.latents, prompts),
        f"UNet, {what}, ours, batch {n}": lambda: tower.extract(subject.latents, prompts),
    }


def time_compiled(bench: Bench, subject: Subject) -> None:
    """Both halves with our tower as it is, and with its pass compiled."""
    compiled, prompts, n = subject.compiled_copy(), prompts_of(subject, halves=2), subject.n
    bench.console.print("compiling, and warming up", style="dim")
    found, expected = (tower.extract(subject.latents, prompts) for tower in (compiled, subject.ours))
    calls = {
        f"UNet, both halves, ours, batch {n}": lambda: subject.ours.extract(subject.latents, prompts),
        f"UNet, both halves, compiled, batch {n}": lambda: compiled.extract(subject.latents, prompts),
    }
    _, row = bench.time(calls, per_call=n).values()
    row.note = difference(found, expected)


def lever_calls(subject: Subject) -> list[dict[str, Call]]:
    """What plain torch does of our pass and of the VAE's encoder, each beside what we do."""
    tower, n, prompts = subject.ours, subject.n, prompts_of(subject, halves=1)
    plain = Subject._cut(subject.stock)
    for module in plain.unet.modules():
        if isinstance(module, SmallMapConv2d):
            module.__class__ = torch.nn.Conv2d
    pixels = subject.pixels
    return [
        {
            f"UNet, to the tap, torch's convolutions, batch {n}": lambda: plain.extract(subject.latents, prompts),
            f"UNet, to the tap, small maps multiplied, batch {n}": lambda: tower.extract(subject.latents, prompts),
        },
        {
            f"VAE encoder, contiguous, batch {n}": lambda: tower.vae.encode(pixels),
            f"VAE encoder, ours, batch {n}": lambda: tower.encode_latents(pixels),
        },
    ]


def encoder_calls(subject: Subject, size: str) -> dict[str, Call]:
    """The VAE's encoder and a tiny autoencoder's."""
    vae, pixels = subject.stock.vae, subject.pixels
    tiny = models.build_tiny_vae(size, pixels.device, pixels.dtype)
    return {
        f"VAE encoder, batch {subject.n}": lambda: vae.encode(pixels),
        f"tiny autoencoder's encoder, batch {subject.n}": lambda: tiny.encode(pixels),
    }


def question_calls(subject: Subject) -> dict[str, Call]:
    """Whole questions: reference (a) and ours; then, of a known image, reference (b) and ours."""
    n = subject.n
    return {
        f"a question, (a) everything anew, batch {n}": subject.stock_question,
        f"a question, ours, batch {n}": subject.our_question,
        f"a follow-up question, (b) whole UNet, batch {n}": subject.stock_follow_up,
        f"a follow-up question, ours, batch {n}": subject.our_follow_up(),
    }


def main(
    model: Annotated[str, typer.Option(help="sd15, sd21 or sdxl.")] = "sd21",
    part: Annotated[list[Part] | None, typer.Option(help="Default unet, guided, encoder and question.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; default 1 to 32 on a GPU.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """The UNet, the encoders and whole questions, beside stock diffusers."""
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
                time_compiled(bench, subject)
            if Part.levers in parts:
                for calls in lever_calls(subject):
                    bench.time(calls, per_call=n)
            if Part.exact in parts:
                for name, error in subject.errors().items():
                    bench.remark(f"guided features at s = 4, batch {n}: {name} {error} from float64")
            if Part.question in parts:
                first, ours, kept, follow_up = bench.time(question_calls(subject), per_call=n).values()
                follow_up.note = f"{kept.median / follow_up.median:.2f}x of (b)"
                expected = subject.ours._to_grid(bench.results[first.name])
                ours.note = difference(bench.results[ours.name], expected)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
