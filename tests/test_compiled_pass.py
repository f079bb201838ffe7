"""The compiled pass of the denoiser: equal features, recompilation, and what cannot be compiled."""

import copy

import pytest
import tiny
import torch
from test_diffusion import ask, tower
from torch._dynamo.testing import CompileCounter

from sdllava.taps import list_taps


@pytest.mark.parametrize(
    ("kind", "taps"),
    [
        pytest.param("sd2", ["D-L0-R0-Res-Out", "D-L0-R0-B0-Cross-Q"], marks=pytest.mark.slow),
        pytest.param("sd2", ["U-L1-R0-Res-Out", "U-L1-R1-B0-Cross-Q"], marks=pytest.mark.slow),
        pytest.param("sdxl", ["D-L1-R0-Res-Out", "D-L1-R0-B0-Cross-Q"], marks=pytest.mark.slow),
    ],
)
def test_a_compiled_pass_gives_the_same_features(kind, taps, caplog):
    model = tower(kind, guidance_scales=[4.0], timesteps=[50, 250], taps=taps)
    expected, other = ask(model).last_hidden_state, ask(model, n=3, seed=1).last_hidden_state
    counter = CompileCounter()
    model.compile_pass(backend=counter)
    for _ in range(2):
        torch.testing.assert_close(ask(model).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1  # of both timesteps, and of the second call
    torch.testing.assert_close(ask(model, n=3, seed=1).last_hidden_state, other, atol=1e-5, rtol=1e-5)
    said = [record.message for record in caplog.records if record.name == "sdllava.compiled_pass"]
    assert [message.split(": ")[0] for message in said] == [
        f"Compiling for latents of shape ({n}, 4, 8, 8)" for n in (2, 3)
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())
    model.load_state_dict(tower(kind, guidance_scales=[4.0], timesteps=[50, 250], taps=model.config.taps).state_dict())
    changed = ask(model).last_hidden_state
    model._compiled_pass = None
    torch.testing.assert_close(changed, ask(model).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, expected, atol=1e-3)


def test_a_compiled_tower_still_trains_and_shows_its_attention():
    plain, compiled = tower(guidance_scales=[1.0]), tower(guidance_scales=[1.0])
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_pass(backend="eager")
    maps = []
    for model in (plain, compiled):
        with model.capture_attention(["U-L1-R1-B0"]) as found:
            ask(model)
        maps.append(found["U-L1-R1-B0", 50])
    assert torch.equal(*maps)
    assert compiled._captures == []
    assert compiled._compiled_pass is not None
    assert copy.deepcopy(compiled)._compiled_pass is None
    latents, prompts, other = (
        torch.randn(1, 4, 8, 8),
        compiled.null_prompt(),
        list_taps(compiled.config.unet_config)[:2],
    )
    with torch.no_grad():
        found, expected = (model.backbone.read(latents, 50, prompts, other) for model in (compiled, plain))
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    compiled.unet.requires_grad_(True)
    inputs = tiny.image_inputs(1)
    compiled(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"]).last_hidden_state.sum().backward()
    assert compiled.unet.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_tap_that_was_compiled_raises():
    model = tower(guidance_scales=[1.0], truncate=False)
    model.unet.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        model.unet(torch.zeros(2, 4, 8, 8), 50, model.null_prompt()["encoder_hidden_states"].repeat(2, 1, 1))
    with pytest.raises(RuntimeError, match="'U-L1-R1-B0-Cross-Q' was not read, because compiled code calls no hooks"):
        ask(model)


def test_blocks_that_a_user_compiled_are_not_captured_in_silence():
    model = tower()
    model.unet.compile_repeated_blocks(backend="eager")
    capture = model.capture_attention(["U-L1-R0-B0"])
    with pytest.raises(RuntimeError, match="'U-L1-R0-B0' cannot be captured, because compiled code calls no hooks"):
        capture.__enter__()
