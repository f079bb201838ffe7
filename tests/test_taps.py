"""Tap names resolve to the modules and sizes that the papers give, and read what a stock hook reads."""

import copy

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from sdllava.configuration import SDLlavaDiffusionConfig
from sdllava.diffusion import SDLlavaDiffusionModel
from sdllava.taps import Tap, canonical_tap_name, list_taps, resolve_taps
from sdllava.unet_pass import cut_away, modules_up_to_taps, reading_taps

SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "layers_per_block": 2,
}


@pytest.mark.parametrize(
    ("name", "size", "channels", "path"),
    [
        ("D-L2-R0-B0-Cross-Q", 16, 1280, "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q"),
        ("U-L1-R1-B0-Cross-Q", 16, 1280, "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"),
        ("U-L1-R1-B0-Out", 16, 1280, "up_blocks.1.attentions.1.transformer_blocks.0"),
        ("U-L1-R2-B0-Cross-Q", 16, 1280, "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q"),
        ("U-L2-R1-B0-Cross-Q", 32, 640, "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q"),
        ("U-L2-R2-Res-Out", 32, 640, "up_blocks.2.resnets.2"),
    ],
)
def test_the_papers_taps_have_the_papers_sizes(name, size, channels, path):
    (tap,) = resolve_taps([name], SDLlavaDiffusionConfig().all_taps())
    assert (tap.height, tap.width, tap.channels, tap.module_path) == (size, size, channels, path)


def test_sdxl_tap_of_the_papers():
    (tap,) = resolve_taps(["up-level0-repeat0-vit-block7-out"], list_taps(SDXL_UNET, latent_size=64))
    assert (tap.name, tap.height, tap.channels) == ("U-L0-R0-B7-Out", 16, 1280)
    assert tap.module_path == "up_blocks.0.attentions.0.transformer_blocks.7"


@pytest.mark.parametrize(
    ("given", "short"),
    [
        ("up-level1-repeat1-vit-block0-cross-q", "U-L1-R1-B0-Cross-Q"),
        ("up-level1-repeat1-vit-block0-out", "U-L1-R1-B0-Out"),
        ("up-level2-repeat2-res-out", "U-L2-R2-Res-Out"),
        ("down-level2-repeat0-vit-out", "D-L2-R0-Vit-Out"),
        ("mid-vit-block0-cross-q", "M-L0-R0-B0-Cross-Q"),
        ("mid-repeat1-res-out", "M-L0-R1-Res-Out"),
        ("u-l1-r1-b0-cross-q", "U-L1-R1-B0-Cross-Q"),
    ],
)
def test_long_names_and_any_case_are_understood(given, short):
    assert canonical_tap_name(given) == short


def test_an_unknown_tap_raises_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"There is no tap 'U-L1-R7-B0-Cross-Q' in this denoiser. The nearest are .*U-L1-R1-B0-Cross-Q"
    ):
        SDLlavaDiffusionConfig(taps=["U-L1-R7-B0-Cross-Q"])


def unet_inputs(kind: str, latent_size: int) -> dict:
    inputs = {"sample": torch.randn(2, 4, latent_size, latent_size), "timestep": 50}
    width = 64 if kind == "sdxl" else 32
    inputs["encoder_hidden_states"] = torch.randn(2, 77, width)
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}
    return inputs


def stock_unet(
    kind: str, latent_size: int, **changes
) -> tuple[UNet2DConditionModel, dict, list[Tap], dict[str, torch.Tensor]]:
    """An untouched UNet, inputs, its taps, and what hooks on them read in one whole pass."""
    config = {**tiny.diffusion_config(kind).unet_config, **changes}
    unet = UNet2DConditionModel.from_config(config).eval()
    inputs, taps = unet_inputs(kind, latent_size), list_taps(config, latent_size)
    outputs = {}
    handles = [
        unet.get_submodule(tap.module_path).register_forward_hook(
            lambda module, args, output, name=tap.name: outputs.update({name: output})
        )
        for tap in taps
    ]
    with torch.no_grad():
        unet(**inputs)
    for handle in handles:
        handle.remove()
    first = {name: x[0] if isinstance(x, tuple) else getattr(x, "sample", x) for name, x in outputs.items()}
    return unet, inputs, taps, first


@pytest.mark.parametrize(
    ("kind", "latent_size"),
    [
        ("sd1", 8),
        ("sd2", 11),
        ("sdxl", 8),
        *(pytest.param(kind, size, marks=pytest.mark.slow) for kind, size in (("sd1", 11), ("sd2", 8), ("sdxl", 11))),
    ],
)
def test_every_tap_equals_a_hook_on_the_whole_stock_unet(kind, latent_size):
    """Names, sizes and values of all taps, read in one pass."""
    unet, inputs, taps, expected = stock_unet(kind, latent_size)
    with torch.no_grad(), reading_taps(unet, taps) as found:
        unet(**inputs)
    for tap, read in zip(taps, found, strict=True):
        assert torch.equal(read, expected[tap.name]), tap.name
        shape = read.shape if read.ndim == 4 else (*read.transpose(1, 2).shape[:2], tap.height, tap.width)
        assert tuple(shape) == (2, tap.channels, tap.height, tap.width), tap.name
        assert read.numel() == 2 * tap.channels * tap.height * tap.width


SOME_TAPS = {
    "sd1": ["M-L0-R1-Res-Out"],
    "sd2": ["D-L0-R0-Res-Out", "D-L1-R0-B0-Cross-Out", "U-L1-R1-B0-Cross-Q", "U-L3-R2-Vit-Out"],
    "sdxl": ["U-L0-R0-B2-Out"],
}
"""Taps whose passes the fast tests run: of every stage and feature."""
PASSES = [
    *(pytest.param(kind, 8, names, id=kind) for kind, names in SOME_TAPS.items()),
    *(
        pytest.param(kind, size, None, id=f"{kind}-{size}-all", marks=pytest.mark.slow)
        for kind, size in (("sd2", 8), ("sdxl", 11))
    ),
]


@pytest.mark.parametrize(("kind", "latent_size", "names"), PASSES)
def test_a_pass_and_a_cut_unet_end_right_after_their_tap(kind, latent_size, names):
    """Each tap in a pass of its own, and from a UNet cut right after it, against a hook on the untouched UNet."""
    changes = {"layers_per_block": 1} if names is None else {}
    unet, inputs, taps, expected = stock_unet(kind, latent_size, **changes)
    with torch.no_grad():
        for tap in taps if names is None else resolve_taps(names, taps):
            with modules_up_to_taps(unet, [tap]) as needed:
                unet(**inputs)
            cut = copy.deepcopy(unet)
            cut_away(cut, needed)
            for module in (unet, cut):
                with reading_taps(module, [tap]) as read:
                    module(**inputs)
                assert torch.equal(read[0], expected[tap.name]), tap.name
            with pytest.raises((RuntimeError, AttributeError), match=r"was cut away\. Load with truncate=False"):
                cut(**inputs)


def test_reading_leaves_nothing_patched():
    unet = UNet2DConditionModel.from_config(tiny.UNET_SD2)
    (tap,) = resolve_taps(["U-L1-R1-B0-Cross-Q"], list_taps(tiny.UNET_SD2))
    with reading_taps(unet, [tap]):
        unet(**unet_inputs("sd2", 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_the_deepest_of_several_taps_decides_the_cut():
    names = ["U-L2-R1-B0-Cross-Q", "D-L0-R0-Res-Out", "U-L1-R1-B0-Out"]
    whole = SDLlavaDiffusionModel(tiny.diffusion_config(taps=names, truncate=False)).eval()
    cut = SDLlavaDiffusionModel(tiny.diffusion_config(taps=names)).eval()
    weights = whole.state_dict()
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
    inputs = tiny.image_inputs(2)
    with torch.no_grad():
        features = [m(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"])[0] for m in (cut, whole)]
    assert torch.equal(*features)
    assert features[0].shape == (2, 16, 64 + 32 + 64)
