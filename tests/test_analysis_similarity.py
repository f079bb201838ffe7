"""Cosine similarity and CKA equal direct formulas and known cases."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdllava.analysis.similarity import FullBatchCKA, MinibatchCKA, pair_similarity, unbiased_hsic
from sdllava.analysis.vision_encoder import VisionEncoder


def direct_hsic(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate by its definition: means over tuples of different examples (Song et al., 2012, eq. 4)."""
    n = len(a)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    triples = [(i, j, q) for i, j in pairs for q in range(n) if q not in (i, j)]
    quadruples = [(i, j, q, r) for i, j, q in triples for r in range(n) if r not in (i, j, q)]
    first = np.mean([a[i, j] * b[i, j] for i, j in pairs])
    second = np.mean([a[i, j] * b[q, r] for i, j, q, r in quadruples])
    third = np.mean([a[i, j] * b[i, q] for i, j, q in triples])
    return first + second - 2 * third


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    a, b = x @ x.T, y @ y.T
    return direct_hsic(a, b) / np.sqrt(direct_hsic(a, a) * direct_hsic(b, b))


def cka(batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    meter = MinibatchCKA(list(batches[0]))
    for batch in batches:
        meter.update(batch)
    return meter.matrix()


def test_cka_equals_the_direct_formula():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(9, 5)) + 3, generator.normal(size=(9, 12)) - 2
    y[:, :5] += x
    expected = direct_cka(x, y)
    found = cka([{"x": torch.tensor(x), "y": torch.tensor(y)}])
    assert found[0, 1] == pytest.approx(expected, rel=1e-9)
    assert found[1, 0] == found[0, 1]
    a, b = x @ x.T, y @ y.T
    assert float(unbiased_hsic(torch.tensor(a), torch.tensor(b))) == pytest.approx(direct_hsic(a, b), rel=1e-9)


def test_minibatch_cka_averages_the_estimates_of_batches():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(12, 4)), generator.normal(size=(12, 6))
    y[:, :4] += 2 * x
    grams = [(a @ a.T, b @ b.T) for a, b in ((x[:5], y[:5]), (x[5:], y[5:]))]
    between = np.mean([direct_hsic(a, b) for a, b in grams])
    within_x, within_y = (np.mean([direct_hsic(pair[i], pair[i]) for pair in grams]) for i in (0, 1))
    found = cka([{"x": torch.tensor(a), "y": torch.tensor(b)} for a, b in ((x[:5], y[:5]), (x[5:], y[5:]))])
    assert found[0, 1] == pytest.approx(between / np.sqrt(within_x * within_y), rel=1e-9)


def test_full_batch_cka_equals_kornblith_s_formula():
    """On features, not on Gram matrices: |Y'X|^2 / (|X'X| |Y'Y|) of centred columns; batches do not matter."""
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(9, 5)) + 3, generator.normal(size=(9, 4, 3)) - 2
    y[:, 0] += x[:, :3]
    flat = y.reshape(9, 12)
    a, b = x - x.mean(axis=0), flat - flat.mean(axis=0)
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    meter = FullBatchCKA(["x", "y"])
    for rows in (slice(0, 4), slice(4, 9)):
        meter.update({"x": torch.tensor(x[rows]), "y": torch.tensor(y[rows])})
    np.testing.assert_allclose(meter.matrix(), [[1, expected], [expected, 1]], rtol=1e-5)
    assert expected > direct_cka(x, flat)  # biased upwards with few examples
    with pytest.raises(ValueError, match="CKA of 0 batches is undefined"):
        FullBatchCKA(["x"]).matrix()


def test_cka_of_equal_rotated_scaled_and_independent_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 16, generator=generator, dtype=torch.float64) + 1
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    every = {
        "x": x,
        "equal": x.clone(),
        "rotated": x @ rotation,
        "scaled": -3 * x + 7,
        "independent": torch.randn(800, 16, generator=generator, dtype=torch.float64),
    }
    whole = cka([every])
    batched = cka([{name: v[i : i + 40] for name, v in every.items()} for i in range(0, 800, 40)])
    for matrix in (whole, batched):
        np.testing.assert_allclose(matrix[0, :4], 1, atol=1e-9)
        np.testing.assert_allclose(matrix, matrix.T)
        assert abs(matrix[0, 4]) < 0.02  # a biased estimate would be near 16 / (16 + 40) in the small batches


def test_cka_of_constant_features_is_nan_and_small_batches_raise_errors():
    found = cka([{"x": torch.randn(8, 3), "y": torch.ones(8, 3)}])
    assert np.isnan(found[0, 1])
    assert found[0, 0] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"at least 4 examples per batch, not 3\. Use a larger batch"):
        MinibatchCKA(["x"]).update({"x": torch.randn(3, 3)})
    with pytest.raises(ValueError, match="CKA of 0 batches is undefined"):
        MinibatchCKA(["x"]).matrix()


def test_pair_similarity_by_position_and_pooled():
    a = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [0, 2]]])
    b = torch.tensor([[[0.0, 1], [1, 0]], [[3, 0], [0, 1]]])
    found = pair_similarity(a, b)
    np.testing.assert_allclose(found.positions, [0, 1])
    np.testing.assert_allclose(found.pooled, [1, (0.5 * 1.5 + 1 * 0.5) / np.hypot(0.5, 1) / np.hypot(1.5, 0.5)])
    maps = pair_similarity(a.view(2, 1, 2, 2), b.view(2, 1, 2, 2))
    np.testing.assert_allclose(maps.positions, found.positions)


@pytest.mark.parametrize(("kind", "name"), [("clip", "CLIP"), ("dinov2", "DINOv2"), ("siglip", "siglip_vision_model")])
def test_vision_encoders_compare_images(published, kind, name):
    encoder = VisionEncoder(str(published[kind]))
    images = [Image.effect_noise((30, 40), 90), Image.effect_noise((64, 32), 90)]
    patches, pooled = encoder(images)
    assert encoder.name == name
    assert patches.shape == (2, 16, 32)
    assert pooled.shape == (2, 32)
    same = encoder.similarity(images, images)
    np.testing.assert_allclose([same.positions, same.pooled], 1, atol=1e-6)
    different = encoder.similarity(images[:1], images[1:])
    assert different.positions[0] < 0.9999
