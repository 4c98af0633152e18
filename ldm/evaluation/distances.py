"""How far two sets of pictures are apart, by their features: FID, KID, precision and recall.

All take features [n, D] of any floating type, one row a picture, and compute in float64 with numpy alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UsageError

Features = NDArray[Any]
BLOCKS = 10  # that KID is computed in
NEIGHBOURS = 3  # of precision and recall: Kynkaanniemi et al., sec. 2


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution: its mean [D] and covariance [D, D]."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def gaussian(features: Features) -> Gaussian:
    """The mean and the unbiased covariance of at least two rows. UsageError for fewer."""
    x = _checked(features, 2)
    mean = x.mean(0)
    return Gaussian(mean, (x - mean).T @ (x - mean) / (len(x) - 1))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), Dowson & Landau 1982; 0 or above but for rounding, which is cut.

    A B is similar to the symmetric R B R with R = A^(1/2), so that all roots are of eigenvalues of symmetric matrices.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    common = np.linalg.eigvalsh(root @ b.covariance @ root)
    shift = ((a.mean - b.mean) ** 2).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(common.clip(0)).sum()
    return max(0.0, float(shift + spread))


def fid(x: Features, y: Features) -> float:
    """The Frechet distance of the Gaussians of two sets (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    It falls with the number of pictures (Chong & Forsyth 2020, arXiv:1911.07023): compare it between sets of one size.
    """
    return frechet(gaussian(x), gaussian(y))


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def kid(x: Features, y: Features, blocks: int = BLOCKS) -> Estimate:
    """The squared maximum mean discrepancy of two sets of one size with the kernel (x y / D + 1)^3 (Binkowski et al.
    2018, arXiv:1801.01401, sec. 4), unbiased, so that it may be below 0.

    It is the mean of the estimates of `blocks` disjoint random parts, which are independent: from their scatter comes
    the standard error (Zaremba et al. 2013, arXiv:1307.1954). x[i] and y[i] may depend on each other, as pictures of
    one prompt do. UsageError for two sizes, or fewer than two rows a block.
    """
    both = [_checked(features, 2 * blocks) for features in (x, y)]
    if len(x) != len(y):
        raise UsageError(f"{len(x)} pictures and {len(y)}; KID is computed of as many")
    order = np.random.default_rng(0).permutation(len(x))  # the rows may be in an order, the blocks must not
    found = [discrepancy(*(each[part] for each in both)) for part in np.array_split(order, blocks)]
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(blocks)))


def discrepancy(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased estimate of `kid` from all pairs i != j of [n, D] and [n, D]: Gretton et al. 2012 (JMLR 13), eq. 4.

    Unlike their eq. 3 it leaves x[i] y[i] out, too, which would count as near where both are of one prompt.
    """
    apart = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    return float((apart.sum() - np.trace(apart)) / (len(x) * (len(x) - 1)))


def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x y / D + 1)^3 of all pairs: [n, D], [m, D] -> [n, m]"""
    cubes: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
    return cubes


class Coverage(NamedTuple):
    """Improved precision and recall, each 0 .. 1 (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""

    precision: float  # share of the drawn pictures that lie among the true ones
    recall: float  # share of the true ones that lie among the drawn


def coverage(drawn: Features, true: Features, k: int = NEIGHBOURS) -> Coverage:
    """Precision and recall; a picture lies among others if it is no farther from one of them than that one's k-th
    nearest neighbour among them. UsageError for k or fewer rows.
    """
    x, y = (_checked(features, k + 1) for features in (drawn, true))
    return Coverage(_among(x, y, k), _among(y, x, k))


def _among(points: NDArray[np.float64], others: NDArray[np.float64], k: int) -> float:
    inner = squared(others, others)
    np.fill_diagonal(inner, np.inf)
    reach = np.partition(inner, k - 1, axis=1)[:, k - 1]
    return float((squared(points, others) <= reach).any(1).mean())


def squared(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances of all pairs: [n, D], [m, D] -> [n, m]"""
    apart: NDArray[np.float64] = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    return apart.clip(0)


def _checked(features: Features, least: int) -> NDArray[np.float64]:
    if features.ndim != 2 or len(features) < least:
        raise UsageError(f"features of shape {list(features.shape)}; give [n, D] with n of at least {least}")
    return features.astype(np.float64)
