"""FID, KID, precision, recall and SSIM against closed forms, scipy, plain loops and exhaustive enumeration."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from ldm.errors import UsageError
from ldm.evaluation.distances import Gaussian, coverage, discrepancy, fid, frechet, gaussian, kid
from ldm.evaluation.reconstruction import psnr, ssim

RNG = np.random.default_rng


def covariance(rng, d):
    a = rng.normal(size=(d, d))
    return a @ a.T / d + 0.1 * np.eye(d)


# -- FID --------------------------------------------------------------------------------------------------------------


def test_frechet_of_independent_numbers_is_that_of_each():
    """Of N(m, s^2) and N(n, t^2) it is (m - n)^2 + (s - t)^2 (Dowson & Landau 1982), summed over independent ones."""
    rng = RNG(0)
    m, n, s, t = (rng.uniform(0.1, 3, 7) for _ in range(4))
    found = frechet(Gaussian(m, np.diag(s**2)), Gaussian(n, np.diag(t**2)))
    assert found == pytest.approx(((m - n) ** 2 + (s - t) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("d", [2, 40])
def test_frechet_is_what_scipys_matrix_root_gives(d):
    rng = RNG(d)
    a, b = (Gaussian(rng.normal(size=d), covariance(rng, d)) for _ in range(2))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9) == pytest.approx(frechet(b, a), rel=1e-9)


def test_gaussian_is_numpys_mean_and_covariance():
    x = RNG(1).normal(size=(30, 5)).astype(np.float32)
    found = gaussian(x)
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64).T), rtol=1e-10)


def test_fid_of_a_set_with_itself_is_nothing_and_of_a_shifted_one_the_shift():
    """Also with fewer pictures than features, where the covariances are singular."""
    for n, d in ((400, 16), (10, 64)):
        x = RNG(2).normal(size=(n, d))
        assert fid(x, x) == pytest.approx(0, abs=1e-5) and fid(x, x) >= 0
        assert fid(x, x + 0.5) == pytest.approx(0.25 * d, abs=1e-5)
        assert fid(x, 3 * x) == pytest.approx((4 * x.mean(0) ** 2 + 4 * x.var(0, ddof=1)).sum(), rel=1e-6)


# -- KID --------------------------------------------------------------------------------------------------------------


def test_the_discrepancy_is_unbiased():
    """Exactly: its mean over every sample of three pairs of numbers, which may depend on each other. There (x y + 1)^3
    is 1 + 3 x y + 3 x^2 y^2 + x^3 y^3, and the true value a sum over differences of moments.
    """
    for pairs in (list(product((0.0, 1.0, -2.0), (1.0, 0.5))), [(0.0, 0.1), (1.0, 1.2), (-2.0, -1.0)]):
        samples = np.array(list(product(pairs, repeat=3)))  # [n, 3, 2]
        found = [discrepancy(sample[:, :1], sample[:, 1:]) for sample in samples]
        moments = [np.diff((np.array(pairs) ** k).mean(0))[0] for k in (1, 2, 3)]
        assert np.mean(found) == pytest.approx(np.square(moments) @ [3, 3, 1], rel=1e-12)


def test_the_discrepancy_is_that_of_plain_loops():
    rng = RNG(3)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)) + 0.3

    def mean(a, b):
        return np.mean([(np.dot(a[i], b[j]) / 4 + 1) ** 3 for i in range(6) for j in range(6) if i != j])

    assert discrepancy(x, y) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), rel=1e-12)


def test_kid_and_its_standard_error():
    """Over 300 pairs of samples: the mean is the closed form of two normal distributions, the scatter is what the
    standard errors say; of samples of one distribution the mean is 0.
    """
    rng = RNG(4)
    for m, s in ((0.0, 1.0), (0.4, 1.2)):
        found = [kid(rng.normal(size=(60, 1)), m + s * rng.normal(size=(60, 1))) for _ in range(300)]
        values, errors = np.array(found).T
        true = 3 * m**2 + 3 * (m**2 + s**2 - 1) ** 2 + (m**3 + 3 * m * s**2) ** 2
        assert abs(values.mean() - true) <= 4 * values.std() / 300**0.5
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.25)


def test_kid_does_not_depend_on_the_order_of_kinds():
    """Two sets of the same ten kinds, one sorted by kind: blocks of rows that follow each other would differ."""
    rng = RNG(5)
    kinds = rng.normal(size=(10, 8)) * 2
    x, y = (kinds[np.arange(200) % 10] + 0.1 * rng.normal(size=(200, 8)) for _ in range(2))
    by_kind = x[np.argsort(np.arange(200) % 10, kind="stable")]
    found = kid(by_kind, y)
    assert abs(found.value) <= 4 * found.error
    straight = [discrepancy(*parts) for parts in zip(np.split(by_kind, 10), np.split(y, 10), strict=True)]
    assert np.mean(straight) > 20 * found.error


# -- precision and recall ---------------------------------------------------------------------------------------------


def test_coverage_is_that_of_plain_loops():
    rng = RNG(6)
    drawn, true = rng.normal(size=(40, 3)), 0.7 * rng.normal(size=(50, 3)) + 0.3

    def among(points, others, k):
        reach = [
            sorted(np.linalg.norm(o - p) for j, p in enumerate(others) if j != i)[k - 1] for i, o in enumerate(others)
        ]
        inside = [any(np.linalg.norm(p - o) <= r for o, r in zip(others, reach, strict=True)) for p in points]
        return np.mean(inside)

    for k in (1, 3):
        assert coverage(drawn, true, k) == (among(drawn, true, k), among(true, drawn, k))


def test_coverage_of_known_cases():
    """Equal sets: all. Sets far apart: nothing. Half of the kinds dropped: precise, and half recalled. One picture
    again and again: precise, recalls next to nothing.
    """
    rng = RNG(7)
    x = rng.normal(size=(200, 2))
    assert coverage(x, x) == (1, 1) and coverage(x, x + 1000) == (0, 0)
    both = np.concatenate([x, x + 100])
    precise, recalled = coverage(x[rng.permutation(200)], both)
    assert precise == 1 and recalled == 0.5
    precise, recalled = coverage(np.repeat(x[:1], 50, 0), x)
    assert precise == 1 and recalled <= 1 / 200
    assert coverage(np.array([[1.9], [2.1]]), np.array([[0.0], [1.0], [5.0]]), 1).precision == 1  # 5 reaches to 1
    assert coverage(np.array([[-1.1], [9.1]]), np.array([[0.0], [1.0], [5.0]]), 1).precision == 0


def test_too_little_is_refused():
    x = RNG(8).normal(size=(3, 2))
    with pytest.raises(UsageError, match="21 pictures and 20"):
        kid(np.zeros((21, 2)), np.zeros((20, 2)))
    for call in (lambda: fid(x[:1], x), lambda: kid(x, x), lambda: coverage(x, x), lambda: gaussian(x[0])):
        with pytest.raises(UsageError, match=r"give \[n, D\] with n of at least"):
            call()


# -- SSIM -------------------------------------------------------------------------------------------------------------


def pictures(seed, *shape):
    return torch.from_numpy(RNG(seed).integers(0, 256, shape)).float() / 127.5 - 1


def test_ssim_is_that_of_scipys_gaussian_filter():
    """Wang et al.'s window is a Gaussian of sigma 1.5, cut off after 5 pixels; away from the border none is padded."""
    x = pictures(0, 2, 3, 24, 20)
    y = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    a, b = ((((v + 1) * 127.5).round()).double().numpy() for v in (x, y))

    def mean(v):
        return ndimage.gaussian_filter(v, 1.5, truncate=3.5, axes=(2, 3))[..., 5:-5, 5:-5]

    m, n = mean(a), mean(b)
    c1, c2 = 6.5025, 58.5225
    found = (2 * m * n + c1) * (2 * (mean(a * b) - m * n) + c2)
    found /= (m**2 + n**2 + c1) * (mean(a * a) - m**2 + mean(b * b) - n**2 + c2)
    np.testing.assert_allclose(ssim(x, y).numpy(), found.mean((1, 2, 3)), rtol=1e-5)


def test_ssim_of_known_cases():
    """1 of equal pictures alone; of two plain ones the first factor of eq. 6 alone; the same the other way round."""
    x, y = pictures(1, 3, 3, 16, 16), pictures(2, 3, 3, 16, 16)
    assert torch.equal(ssim(x, x), torch.ones(3)) and (ssim(x, y) < 0.5).all() and torch.equal(ssim(x, y), ssim(y, x))
    gray, light = (torch.full((1, 3, 12, 12), v / 127.5 - 1) for v in (100.0, 150.0))
    expected = (2 * 100 * 150 + 6.5025) / (100**2 + 150**2 + 6.5025)
    assert float(ssim(gray, light)) == pytest.approx(expected, rel=1e-5)
    inverse = ssim(x, -x)
    assert (inverse < 0).all() and (inverse > -1).all()
    assert float(psnr(gray, light)) == pytest.approx(20 * np.log10(255 / 50), rel=1e-6)
