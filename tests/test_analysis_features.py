"""Feature maps: one pass for all taps, principal components, differences and register tokens."""

import functools

import numpy as np
import pytest
import tiny
import torch
from sklearn.decomposition import PCA as SklearnPCA

from sdllava import SDLlavaDiffusionModel, list_taps
from sdllava.analysis.features import delta_maps, find_registers, fit_pca, pca_maps
from sdllava.analysis.reading import FeatureMap, choose_taps, read_features, reconfigure
from sdllava.grids import resize_grid


def tower(kind: str = "sd2", **fields) -> SDLlavaDiffusionModel:
    return SDLlavaDiffusionModel(tiny.diffusion_config(kind, **{"truncate": False, **fields})).eval()


@functools.cache
def truncated_tower() -> SDLlavaDiffusionModel:
    return tower(taps=["U-L1-R1-B0-Cross-Q"], truncate=True)


def prompts(model, n: int = 2) -> dict[str, torch.Tensor]:
    ids = tiny.prompt_ids(n)
    return model.encode_prompts(ids, ids if model.config.text_encoder_2_config else None)


def latents(model, n: int = 2) -> torch.Tensor:
    return model.encode_latents(tiny.image_inputs(n)["diffusion_pixel_values"])


@pytest.mark.parametrize("kind", ["sd2", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_taps_that_are_read_together_equal_those_of_a_tower_with_one_tap(kind):
    model = tower(kind)
    names = [tap.name for tap in list_taps(model.config.unet_config)]
    timesteps, scales = [10, 500], [0.0, 1.0, 4.0]
    found = list(read_features(model, latents(model), prompts(model), names, timesteps, scales))
    assert [m.key for m in found] == [(n, t, s) for t in timesteps for n in names for s in scales]
    ids = tiny.prompt_ids(2)
    chosen = found[::101]
    assert {feature.timestep for feature in chosen} == set(timesteps)
    assert {feature.guidance_scale for feature in chosen} == set(scales)
    for feature in chosen:
        fields = {"taps": [feature.tap], "timesteps": [feature.timestep], "guidance_scales": scales}
        single = tower(kind, **fields, grid_size=feature.values.shape[1])
        single.load_state_dict(model.state_dict())
        output = single(latents=latents(model), input_ids=ids, input_ids_2=ids).last_hidden_state
        part = output.chunk(3, dim=-1)[scales.index(feature.guidance_scale)]
        assert torch.equal(feature.values.flatten(1, 2), part)


def test_a_reconfigured_tower_shares_weights_and_does_not_modify_the_original():
    model = truncated_tower()
    before = model.config.to_dict()
    reader = reconfigure(model, taps=["D-L2-R0-B0-Out"], timesteps=[500], guidance_scales=[0.0, 2.0])
    assert reader.unet is model.unet
    assert model.config.to_dict() == before
    inputs = tiny.image_inputs(2)
    output = reader(inputs["diffusion_pixel_values"], inputs["diffusion_input_ids"])
    assert output.last_hidden_state.shape == (2, 16, 128)
    one, two = read_features(model, latents(model), prompts(model), ["D-L2-R0-B0-Out"], [500], [0.0, 2.0])
    assert torch.equal(output.unconditional_features, resize_grid(one.values.permute(0, 3, 1, 2), 4))
    guided_on_the_grid = output.last_hidden_state[..., 64:]
    torch.testing.assert_close(guided_on_the_grid, resize_grid(two.values.permute(0, 3, 1, 2), 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"taps": ["U-L1-R1-B0-Out"]},
            "Tap 'U-L1-R1-B0-Out' comes after 'U-L1-R1-B0-Cross-Q', the last tap of this truncated model",
        ),
        ({"taps": ["U-L9-R0-B0-Out"]}, "There is no tap 'U-L9-R0-B0-Out' in this denoiser. The nearest are U-L"),
        ({"timesteps": [1000]}, r"Timestep 1000 is outside the training schedule. Use a value in 0..999\."),
        ({"prompts": None, "guidance_scales": [4.0]}, r"Guidance scales \[4.0\] need a question"),
    ],
)
def test_features_that_cannot_be_read_raise_errors(arguments, message):
    model = truncated_tower()
    arguments = {"prompts": prompts(model), **arguments}
    with pytest.raises(ValueError, match=message):
        list(read_features(model, latents(model), **arguments))
    assert choose_taps(model) == model.taps


@pytest.mark.parametrize("shape", [(200, 20), (15, 40)])
def test_pca_equals_that_of_scikit_learn_up_to_the_fixed_sign(shape):
    generator = np.random.default_rng(0)
    features = (generator.normal(size=shape) @ np.diag(np.linspace(0.1, 3, shape[1]))).astype(np.float32) + 5
    ours, theirs = fit_pca(features), SklearnPCA(3, svd_solver="full").fit(features.astype(np.float64))
    signs = np.sign((ours.components * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.components, theirs.components_ * signs[:, None], atol=1e-7)
    np.testing.assert_allclose(ours.explained_variance_ratio, theirs.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(ours.scores(features), theirs.transform(features) * signs, atol=1e-5)
    assert (ours.components[np.arange(3), np.abs(ours.components).argmax(axis=1)] > 0).all()
    flipped = fit_pca(features[::-1])
    np.testing.assert_allclose(flipped.components, ours.components, atol=1e-9)
    np.testing.assert_allclose(flipped.colours(features), ours.colours(features), atol=1e-9)
    colours = ours.colours(features)
    assert colours.min() == 0
    assert colours.max() == 1


def test_pca_is_joint_over_the_fields_that_do_not_separate_groups():
    model = tower()
    found = list(
        read_features(model, latents(model, 3), prompts(model, 3), ["D-L0-R0-B0-Out", "U-L2-R0-B0-Out"], [9, 99])
    )
    joint = pca_maps(found)
    assert len({id(m.pca) for m in joint}) == 2
    assert joint[0].pca is joint[2].pca
    pixels = np.concatenate([m.values.reshape(-1, 32).numpy() for m in found if m.tap == "D-L0-R0-B0-Out"])
    np.testing.assert_allclose(joint[0].pca.components, fit_pca(pixels).components)
    assert joint[0].colours.shape == (3, 8, 8, 3)
    separate = pca_maps(found, fit_per=("tap", "timestep"))
    assert len({id(m.pca) for m in separate}) == 4
    with pytest.raises(ValueError, match=r"equal channels, but the taps have \[32, 64\]"):
        pca_maps(found, fit_per=())


def test_delta_is_the_difference_of_conditional_and_unconditional_features():
    model = tower(taps=["U-L1-R1-B0-Out"])
    found = list(read_features(model, latents(model), prompts(model), guidance_scales=[0, 1]))
    (delta,) = delta_maps(found)
    expected = (found[1].values - found[0].values).numpy()
    assert np.array_equal(delta.difference, expected)
    length = np.linalg.norm(found[0].values.numpy()[0], axis=-1).mean()
    np.testing.assert_allclose(delta.heat[0], np.linalg.norm(expected[0], axis=-1) / length, rtol=1e-5)
    assert delta.heat.shape == (2, 2, 2)
    assert delta.pca().colours.shape == (2, 2, 2, 3)
    null = model.null_prompt()["encoder_hidden_states"].expand(2, -1, -1)
    same = delta_maps(list(read_features(model, latents(model), {"encoder_hidden_states": null}, None, None, [0, 1])))
    assert same[0].heat.max() < 1e-5
    with pytest.raises(
        ValueError, match=r"The difference at 'U-L1-R1-B0-Out', t = 50 needs the guidance scales 0 and 1"
    ):
        delta_maps(found[:1])


def test_registers_are_found_at_their_positions():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 8, 8, 64))
    shared = generator.normal(size=64) * 20
    positions = [(0, 1, 2), (1, 5, 5), (2, 3, 3), (2, 7, 0)]
    for position in positions:
        values[position] = shared + generator.normal(size=64)
    report = find_registers(FeatureMap("U-L1-R1-Res-Out", 50, 0.0, torch.tensor(values)))
    assert [tuple(position) for position in np.argwhere(report.outlying)] == positions
    assert report.per_image == pytest.approx(4 / 3)
    assert report.shared_similarity > 0.99 > 0.6 > report.ordinary_similarity
    assert report.norm_ratio[0, 1, 2] > 15
    assert 0.5 < report.variance_share < 1
    plain = find_registers(FeatureMap("U-L1-R1-Res-Out", 50, 0.0, torch.tensor(generator.normal(size=(3, 8, 8, 64)))))
    assert not plain.outlying.any()
    assert np.isnan(plain.shared_similarity)
    assert plain.variance_share == 0
