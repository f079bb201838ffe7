"""Small, wide maps are convolved as matrix products: the same numbers and weights, only where that is meant."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from sdllava import SDLlavaDiffusionModel, small_maps
from sdllava.small_maps import SmallMapConv2d


@pytest.fixture
def products(monkeypatch):
    """Counts the inputs that are unfolded, on every CPU up to 16x16."""
    monkeypatch.setattr(small_maps, "MOST_POSITIONS", 256)
    shapes, unfold = [], F.unfold
    monkeypatch.setattr(F, "unfold", lambda x, *args: shapes.append(tuple(x.shape)) or unfold(x, *args))
    return shapes


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"bias": False}])
@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_products_are_the_convolution(options, size, products):
    plain, x = nn.Conv2d(24, 8, 3, **options), torch.randn(3, 24, *size)
    small = SmallMapConv2d.sharing(plain)
    assert small.weight is plain.weight
    with torch.no_grad():
        torch.testing.assert_close(small(x), plain(x), rtol=0, atol=1e-5)
    assert len(products) == 1


def test_large_maps_half_precision_and_gradients_take_torchs_own_convolution(products):
    conv, x = SmallMapConv2d(24, 8, 3, padding=1), torch.randn(1, 24, 16, 16)
    with torch.no_grad():
        conv(torch.randn(1, 24, 16, 17))
        conv.to(torch.bfloat16)(x.to(torch.bfloat16))
    conv.float()(x).sum().backward()
    assert not products
    assert conv.weight.grad is not None


@pytest.mark.parametrize("loaded", [False, True])
def test_only_wide_kernels_of_a_tower_are_changed_and_its_features_stay(loaded, published, monkeypatch, products):
    def build() -> SDLlavaDiffusionModel:
        torch.manual_seed(0)
        if loaded:
            taps = ["U-L1-R1-B0-Cross-Q"]
            return SDLlavaDiffusionModel.from_component_pretrained(published["sd2"], taps=taps, image_size=64)
        return SDLlavaDiffusionModel(tiny.diffusion_config("sd2")).eval()

    latents = torch.randn(2, 4, 8, 8)
    plain = build()
    with torch.no_grad():
        expected = plain(latents=latents).last_hidden_state
    assert not products
    assert not any(isinstance(m, SmallMapConv2d) for m in plain.modules())

    widest = max(m.in_channels for m in plain.unet.modules() if isinstance(m, nn.Conv2d))
    monkeypatch.setattr(small_maps, "FEWEST_CHANNELS", widest)
    tower = build()
    changed = [m for m in tower.modules() if isinstance(m, SmallMapConv2d)]
    assert changed
    assert all(m.in_channels == widest and m.kernel_size == (3, 3) for m in changed)
    assert list(tower.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        found = tower(latents=latents).last_hidden_state
    assert products
    assert (found - expected).norm() < 1e-5 * expected.norm()
