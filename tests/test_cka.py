"""Linear CKA against a naive derivation, and what it must not depend on."""

import itertools
import math

import pytest
import torch

from kdkit.study.report.cka import LayerSimilarity, linear_cka


def features(seed, n=12, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_hsic(x, y):
    """The unbiased HSIC as what it estimates from: means of products of kernel values over tuples of different samples."""
    n = len(x)
    k, m = [[[float(a @ b) for b in z] for a in z] for z in (x, y)]
    pairs, triples, fours = (list(itertools.permutations(range(n), r)) for r in (2, 3, 4))
    both = sum(k[i][j] * m[i][j] for i, j in pairs) / len(pairs)
    apart = sum(k[i][j] * m[q][r] for i, j, q, r in fours) / len(fours)
    chained = sum(k[i][j] * m[i][q] for i, j, q in triples) / len(triples)
    return both + apart - 2 * chained


def test_cka_is_what_a_naive_derivation_gives():
    x, y = features(0, n=7), features(1, n=7, d=3) + features(0, n=7)[:, :3]
    naive = naive_hsic(x, y) / math.sqrt(naive_hsic(x, x) * naive_hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(naive, rel=1e-9)


def test_cka_of_a_layer_turned_scaled_and_moved_is_1():
    x = features(0)
    turn = torch.linalg.qr(features(2, n=5))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3.5 * x @ turn + 2) == pytest.approx(1)
    y = features(1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(-2 * x @ turn, y + 7))


def test_cka_is_symmetric_and_about_0_for_unrelated_layers():
    x, y = features(0, n=200, d=2000), features(1, n=200, d=2000)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert abs(linear_cka(x, y)) < 0.05  # the biased form gives above 0.9 here


def test_cka_adds_up_batches_and_flattens_maps():
    x, y = features(0, n=16, d=12), features(1, n=16, d=12)
    similarity = LayerSimilarity(("x", "y"), ("y", "x"))
    for part in (slice(0, 8), slice(8, 16)):
        similarity.add({"x": x[part].view(8, 3, 2, 2), "y": y[part]}, {"x": x[part], "y": y[part]})
    similarity.add({"x": x[:3], "y": y[:3]}, {"x": x[:3], "y": y[:3]})  # too few for an estimate
    found = similarity.matrix()
    sums = {pair: sum(naive_hsic(pair[0][p], pair[1][p]) for p in (slice(0, 8), slice(8, 16))) for pair in ((x, y), (x, x), (y, y))}
    expected = sums[x, y] / math.sqrt(sums[x, x] * sums[y, y])
    assert similarity.samples == 16
    assert torch.allclose(found, torch.tensor([[expected, 1], [1, expected]], dtype=torch.float64))


def test_cka_without_a_value():
    assert math.isnan(linear_cka(torch.ones(8, 3), features(0, n=8)))
    with pytest.raises(ValueError, match="4 samples"):
        linear_cka(torch.ones(3, 3), torch.ones(3, 3))
