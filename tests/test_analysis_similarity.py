"""Cosine similarity and CKA against direct formulas and known cases."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdllava.analysis.similarity import MinibatchCKA, StaticEncoder, pair_similarity, unbiased_hsic


def direct_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The unbiased estimate by its definition: means over tuples of different examples (Song et al., 2012, eq. 4)."""
    n = len(k)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    triples = [(i, j, q) for i, j in pairs for q in range(n) if q not in (i, j)]
    quadruples = [(i, j, q, r) for i, j, q in triples for r in range(n) if r not in (i, j, q)]
    first = np.mean([k[i, j] * l[i, j] for i, j in pairs])
    second = np.mean([k[i, j] * l[q, r] for i, j, q, r in quadruples])
    third = np.mean([k[i, j] * l[i, q] for i, j, q in triples])
    return first + second - 2 * third


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return direct_hsic(k, l) / np.sqrt(direct_hsic(k, k) * direct_hsic(l, l))


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
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert float(unbiased_hsic(torch.tensor(k), torch.tensor(l))) == pytest.approx(direct_hsic(k, l), rel=1e-9)


def test_minibatch_cka_averages_the_estimates_of_batches():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(12, 4)), generator.normal(size=(12, 6))
    y[:, :4] += 2 * x
    grams = [(a @ a.T, b @ b.T) for a, b in ((x[:5], y[:5]), (x[5:], y[5:]))]
    kl, kk, ll = (np.mean([direct_hsic(*p(k, l)) for k, l in grams]) for p in _pairings())  # noqa: E741
    found = cka([{"x": torch.tensor(a), "y": torch.tensor(b)} for a, b in ((x[:5], y[:5]), (x[5:], y[5:]))])
    assert found[0, 1] == pytest.approx(kl / np.sqrt(kk * ll), rel=1e-9)


def _pairings():
    return [lambda k, l: (k, l), lambda k, l: (k, k), lambda k, l: (l, l)]  # noqa: E741


def test_known_cases_equal_rotated_scaled_independent():
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


def test_cka_of_something_constant_is_nan_and_small_batches_are_refused():
    found = cka([{"x": torch.randn(8, 3), "y": torch.ones(8, 3)}])
    assert np.isnan(found[0, 1])
    assert found[0, 0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 4 examples at once, not 3"):
        MinibatchCKA(["x"]).update({"x": torch.randn(3, 3)})
    with pytest.raises(ValueError, match="no batch was given"):
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
def test_static_encoders_compare_too(published, kind, name):
    encoder = StaticEncoder(str(published[kind]))
    images = [Image.effect_noise((30, 40), 90), Image.effect_noise((64, 32), 90)]
    patches, pooled = encoder(images)
    assert encoder.name == name
    assert patches.shape == (2, 16, 32)
    assert pooled.shape == (2, 32)
    same = encoder.similarity(images, images)
    np.testing.assert_allclose([same.positions, same.pooled], 1, atol=1e-6)
    different = encoder.similarity(images[:1], images[1:])
    assert different.positions[0] < 0.9999
