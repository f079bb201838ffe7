"""Ensembles of guidance scales and taps: what each can represent, where its gradients come from, and its limits."""

import copy
import functools

import pytest
import tiny
import torch

from sdllava.fusion import FUSIONS, AttentionOverMaps, CrossAttentionFusion, MultiLevelFusion
from sdllava.guidance import FeatureEnsemble, guide
from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration

SCALES = [0.0, 4.0]
FINE, COARSE = "U-L2-R1-B0-Cross-Q", "U-L1-R1-B0-Cross-Q"
SINGLE_SCALES = torch.linspace(-8, 8, 321).tolist()
MODELS = {
    "select": {"diffusion_fields": {"guidance_scales": SCALES, "ensemble": "select"}},
    "attention_over_maps": {"fusion": "attention_over_maps", "diffusion_fields": {"guidance_scales": SCALES}},
    "concat": {"diffusion_fields": {"guidance_scales": SCALES, "ensemble": "concat"}},
    "multi_level": {"fusion": "multi_level", "diffusion_fields": {"taps": [FINE, COARSE], "grid_size": 8}},
    "top_k": {
        "diffusion_fields": {
            "taps": ["D-L2-R0-B0-Cross-Q", COARSE, "U-L1-R1-B0-Out"],
            "ensemble": "select",
            "ensemble_top_k": 2,
        }
    },
}


def random_features(channels: int = 64, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, tokens, channels, generator=generator) for _ in range(2))


def smallest_error(target: torch.Tensor, of_scale) -> float:
    """How near a single scale comes to the target: the smallest over scales of the largest difference."""
    return min((of_scale(s) - target).abs().max().item() for s in SINGLE_SCALES)


def test_an_average_over_scales_is_one_scale():
    """S3's guidance is linear, so mean and softmax weights only choose a scale."""
    unconditional, conditional = random_features()
    scales = [0.0, 1.0, 4.0]
    by_scale = [guide(unconditional, conditional, s) for s in scales]
    averages = {"mean": 5 / 3, "learned": 0.5 * 0 + 0.2 * 1 + 0.3 * 4}
    for mode, effective in averages.items():
        ensemble = FeatureEnsemble(tiny.diffusion_config(guidance_scales=scales, ensemble=mode))
        if mode == "learned":
            ensemble.weight.data = torch.tensor([0.5, 0.2, 0.3]).log()
        expected = guide(unconditional, conditional, effective)
        torch.testing.assert_close(ensemble(by_scale), expected, rtol=1e-5, atol=1e-5)
    assert smallest_error(by_scale[2], lambda s: guide(unconditional, conditional, s)) < 0.2  # 4 is between grid points


def test_selection_takes_one_scale_for_one_token_and_another_for_the_next():
    unconditional, conditional = random_features()
    unconditional[0, :8, 0], unconditional[0, 8:, 0] = 5.0, -5.0
    ensemble = FeatureEnsemble(tiny.diffusion_config(guidance_scales=SCALES, ensemble="select"))
    by_scale = [guide(unconditional, conditional, s) for s in SCALES]
    torch.testing.assert_close(ensemble(by_scale), sum(by_scale) / 2)  # begins as the mean
    ensemble.gate.weight.data[0, 0], ensemble.gate.weight.data[1, 0] = 100.0, -100.0
    target = torch.cat([by_scale[0][:, :8], by_scale[1][:, 8:]], dim=1)
    torch.testing.assert_close(ensemble(by_scale), target)
    assert smallest_error(target, lambda s: guide(unconditional, conditional, s)) > 1


def test_concatenation_takes_one_scale_for_one_channel_and_another_for_the_next():
    unconditional, conditional = random_features()
    ensemble = FeatureEnsemble(tiny.diffusion_config(guidance_scales=SCALES, ensemble="concat"))
    by_scale = [guide(unconditional, conditional, s) for s in SCALES]
    readout = torch.zeros(2, 128)
    readout[0, 0] = readout[1, 64 + 1] = 1.0  # channel 0 at the first scale, channel 1 at the second
    found = ensemble(by_scale) @ readout.T
    target = torch.stack([by_scale[0][..., 0], by_scale[1][..., 1]], dim=-1)
    assert torch.equal(found, target)
    assert smallest_error(target, lambda s: guide(unconditional, conditional, s)[..., :2]) > 1


def test_attention_over_maps_reads_one_scale_for_one_query_and_another_for_the_next():
    """The map's embedding outweighs the features in the keys, so a query attends to all tokens of one map."""
    config = tiny.config(**MODELS["attention_over_maps"])
    width, diffusion_width = config.vision_hidden_size, config.diffusion_config.hidden_size // 2
    torch.manual_seed(0)
    fusion, plain = AttentionOverMaps(config), CrossAttentionFusion(config, diffusion_width)
    torch.nn.init.normal_(fusion.out_proj.weight, std=0.2)
    fusion.map_embedding.data[0, 0], fusion.map_embedding.data[1, 0] = 1e5, -1e5
    for projection in (fusion.q_proj, fusion.k_proj):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    heads = torch.arange(0, width, width // config.fusion_num_attention_heads)
    fusion.q_proj.weight.data[heads, 0] = 2e-4
    fusion.k_proj.weight.data[heads, 0] = 1.0
    torch.nn.init.zeros_(fusion.v_proj.weight[:, 0])  # the values leave the embedding out
    plain.load_state_dict({name: x for name, x in fusion.state_dict().items() if name != "map_embedding"})
    torch.nn.init.zeros_(plain.q_proj.weight)  # all tokens of its only map
    vision = torch.randn(1, config.vision_grid_size**2, width)
    vision[..., 0] = torch.tensor([9.0, -9.0]).repeat(vision.shape[1] // 2)
    unconditional, conditional = random_features(diffusion_width)

    def single(scale: float) -> torch.Tensor:
        return plain(vision, guide(unconditional, conditional, scale))

    found = fusion(vision, torch.cat([guide(unconditional, conditional, s) for s in SCALES], dim=-1))
    target = single(SCALES[0]).clone()
    target[:, 1::2] = single(SCALES[1])[:, 1::2]
    torch.testing.assert_close(found, target, rtol=0, atol=1e-3)
    assert smallest_error(target, single) > 0.03


def test_a_sparse_selection_keeps_the_best_maps_and_trains_all_of_them():
    config = tiny.diffusion_config(guidance_scales=[0.0, 1.0, 4.0], ensemble="select", ensemble_top_k=2)
    ensemble = FeatureEnsemble(config)
    torch.nn.init.normal_(ensemble.gate.weight, std=0.05)
    unconditional, conditional = random_features()
    parts = [guide(unconditional, conditional, s) for s in config.guidance_scales]
    weights = ensemble._selection(parts)
    assert ((weights.abs() > 1e-6).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 16))
    ensemble.top_k = None
    dense = ensemble._selection(parts)
    assert torch.equal(weights.argmin(-1), dense.argmin(-1))
    ensemble.top_k = 1
    ensemble(parts).square().sum().backward()
    assert (ensemble.gate.bias.grad.abs() > 0).all()


def test_levels_are_fused_from_coarse_to_fine():
    config = tiny.config(**MODELS["multi_level"])
    torch.manual_seed(0)
    fusion = MultiLevelFusion(config)
    for level in fusion.levels:
        torch.nn.init.normal_(level.out_proj.weight)
    taps = config.diffusion_config.resolved_taps()
    assert [tap.height for tap in taps] == [8, 4] or taps[0].height > taps[1].height
    vision = torch.randn(1, config.vision_grid_size**2, config.vision_hidden_size)
    features = torch.randn(1, 64, sum(tap.channels for tap in taps))
    fine, coarse = features.split([tap.channels for tap in taps], dim=-1)
    expected = fusion.levels[0](fusion.levels[1](vision, coarse), fine)
    assert torch.equal(fusion(vision, features), expected)
    assert not torch.equal(fusion.levels[1](fusion.levels[0](vision, fine), coarse), expected)


@functools.cache
def model_of(name: str) -> SDLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return SDLlavaForConditionalGeneration(tiny.config(**MODELS[name])).eval()


def inputs_of(model: SDLlavaForConditionalGeneration, prompt: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[319] * model.config.num_image_tokens, 5, 6, 7]])
    images = tiny.image_inputs(1)
    if prompt is not None:
        images["diffusion_input_ids"] = prompt
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "select")) for n in MODELS])
def test_models_begin_without_the_diffusion_features_and_survive_a_round_trip(name, tmp_path):
    model = model_of(name)
    vision = torch.randn(1, model.config.vision_grid_size**2, model.config.vision_hidden_size)
    tower = model.config.diffusion_config
    features = torch.randn(1, tower.grid_size**2, tower.hidden_size)
    assert torch.equal(model.model.fusion(vision, features), vision)  # a LLaVA's own logits
    model.save_pretrained(tmp_path)
    loaded = SDLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in model.state_dict().items())
    with torch.no_grad():
        expected, found = model(**inputs_of(model)).logits, loaded(**inputs_of(model)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("select", ["diffusion_tower.ensemble.gate.weight"]),
        ("attention_over_maps", ["fusion.map_embedding"]),
        ("concat", ["fusion.v_proj.weight"]),
        ("multi_level", ["fusion.levels.0.k_proj.weight", "fusion.levels.1.k_proj.weight"]),
        ("top_k", ["diffusion_tower.ensemble.gate.weight", "diffusion_tower.ensemble.gate.bias"]),
    ],
)
def test_weights_receive_gradients_in_the_stage_that_trains_them(name, own):
    """A gate between scales trains in stage 2: in stage 1 the prompt is empty, and all scales are equal."""
    model = copy.deepcopy(model_of(name))
    for parameter, x in model.model.fusion.named_parameters():
        if "out_proj.weight" in parameter:
            torch.nn.init.normal_(x)
    null = torch.tensor([model.config.diffusion_config.null_input_ids])
    found = {}
    for stage, prompt in (("align", null), ("finetune", None)):
        model.set_stage(stage)
        model.zero_grad()
        inputs = inputs_of(model, prompt)
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 319, -100)).loss.backward()
        gradients = dict(model.model.named_parameters())
        found[stage] = [gradients[key].grad.abs().max().item() for key in own]
    assert min(found["finetune"]) > 1e-9
    if name == "select":
        assert max(found["align"]) < 1e-3 * min(found["finetune"])
    else:
        assert min(found["align"]) > 1e-9


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"diffusion_fields": {"ensemble_top_k": 1}}, "needs ensemble='select'"),
        ({"diffusion_fields": {"ensemble": "select", "ensemble_top_k": 2}}, "at most 1 maps to keep"),
        ({"fusion": "attention_over_maps", "diffusion_fields": {"ensemble": "mean"}}, "reads separate maps"),
        (
            {"fusion": "attention_over_maps", "diffusion_fields": {"taps": [FINE, "U-L3-R1-B0-Cross-Q"]}},
            "also needs taps of one width",
        ),
        ({"fusion": "multi_level"}, "needs taps of different resolutions"),
        ({"fusion": "multi_level", "vision": None}, "does not fit one encoder"),
    ],
)
def test_fields_that_do_not_fit_raise(fields, reason):
    with pytest.raises(ValueError, match=reason):
        tiny.config(**fields)


def test_every_fusion_has_a_name_in_the_command():
    from sdllava.commands.compose import Fusion

    assert {fusion.value for fusion in Fusion} == set(FUSIONS)
