"""The noise levels a network is trained on, and the forward process that makes them.

Time runs over the integers t = 0 .. T-1 and betas[t] is the variance added at t, so that t = -1 is the clean image.
Everything is float64 numpy. diffusers computes the same tables in float32: its alphas_cumprod differ from these by some
1e-6 of their value, and by up to 1e-4 in the last entries of the cosine schedule, whose 1 - beta is 0.001; to reproduce
a diffusers run closer than that, hand its own betas to `NoiseSchedule.trained`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.errors import UsageError, choose

Array = NDArray[np.float64]
Variance = Literal["fixed_small", "fixed_large"]
FIXED: tuple[Variance, ...] = ("fixed_small", "fixed_large")
VARIANCES = (*FIXED, "learned", "learned_range")


class Gaussian(NamedTuple):
    """q(x_t | x_s) = N(scale * x_s, variance), the variance isotropic."""

    scale: float
    variance: float


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x0) = N(x0_coefficient * x0 + xt_coefficient * x_t, variance)."""

    x0_coefficient: float
    xt_coefficient: float
    variance: float


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t).

    Ho et al. 2020 (arXiv:2006.11239), eq. 2.
    betas: float64 [T], each in (0, 1]; a last beta of 1 means zero terminal SNR (nothing of the image is left).
    """

    betas: Array

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
            raise UsageError("betas must be a non-empty list of numbers above 0 and below 1 (the last may be 1)")
        betas.flags.writeable = False
        object.__setattr__(self, "betas", betas)

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000
    ) -> "NoiseSchedule":
        """Betas on a line: Ho et al. 2020, section 4."""
        return cls(np.linspace(beta_start, beta_end, num_train_timesteps))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> "NoiseSchedule":
        """Square roots of the betas on a line: latent diffusion and Stable Diffusion (to CompVis, "linear")."""
        return cls(np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2)

    @classmethod
    def squaredcos_cap_v2(
        cls, num_train_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999
    ) -> "NoiseSchedule":
        """The cosine schedule: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17."""
        u = np.arange(num_train_timesteps + 1) / num_train_timesteps
        alpha_bar = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
        return cls(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))

    @classmethod
    def trained(cls, betas: Sequence[float] | Array) -> "NoiseSchedule":
        """Betas given one by one, as `trained_betas` of a scheduler_config.json."""
        return cls(np.asarray(betas, dtype=np.float64))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler_config.json (a dict); an absent field has the default of diffusers'
        DDPM.

        Reads num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas and rescale_betas_zero_snr,
        nothing else. UsageError: an unknown beta_schedule (the nearest is offered), fewer than 1 timestep, betas out of
        range.
        """
        steps, name = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "linear")
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        if steps < 1:
            raise UsageError(f"num_train_timesteps is {steps}; a schedule has at least 1")
        makers: dict[str, Callable[[], NoiseSchedule]] = {
            "linear": lambda: cls.linear(start, end, steps),
            "scaled_linear": lambda: cls.scaled_linear(start, end, steps),
            "squaredcos_cap_v2": lambda: cls.squaredcos_cap_v2(steps),
        }
        trained = config.get("trained_betas")
        schedule = makers[choose("beta_schedule", name, makers)]() if trained is None else cls.trained(trained)
        return schedule.with_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    def with_zero_terminal_snr(self) -> "NoiseSchedule":
        """sqrt(alphas_cumprod) shifted so that the last is 0 and scaled so that the first stays as it is.

        Lin et al. 2023 (arXiv:2305.08891), algorithm 1. UsageError for a schedule of a single timestep, which has no
        first level to keep.
        """
        if self.num_train_timesteps < 2:
            raise UsageError("zero terminal SNR needs a schedule of at least 2 timesteps")
        root = np.sqrt(self.alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return type(self)(1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]]))

    def with_terminal_sigma(self, sigma: float) -> "NoiseSchedule":
        """The same schedule with another last noise level: a finite stand-in where that is infinite (SNR 0)."""
        betas = self.betas.copy()
        betas[-1] = 1 - 1 / ((1 + sigma**2) * self.alpha_bar(self.num_train_timesteps - 2))
        return type(self)(betas)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """The share of the image in the variance of x_t, prod_{s<=t} (1 - beta_s): float64 [T], falling."""
        table = np.cumprod(1 - self.betas, dtype=np.float64)
        table.flags.writeable = False
        return table

    @cached_property
    def rates(self) -> tuple[Array, Array]:
        """Signal and noise rate of every timestep, sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod): float64 [T]."""
        return np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)

    @property
    def told(self) -> NDArray[np.int64]:
        """What the network is told at every level: the timesteps, int64 [T]."""
        return np.arange(self.num_train_timesteps)

    @cached_property
    def sigmas(self) -> Array:
        """sqrt((1 - alphas_cumprod) / alphas_cumprod), sigma in x = x0 + sigma noise: float64 [T], rising."""
        with np.errstate(divide="ignore"):
            table = np.asarray(np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod), dtype=np.float64)
        table.flags.writeable = False
        return table

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing of the image is left at T-1."""
        return bool(self.alphas_cumprod[-1] == 0)

    @overload
    def sigma(self, t: float) -> float: ...
    @overload
    def sigma(self, t: Array) -> Array: ...
    def sigma(self, t: ArrayLike) -> float | Array:
        """The noise level at time t, which may be fractional (linear in between, ends held); inf only at T-1 itself."""
        finite = self.sigmas[np.isfinite(self.sigmas)]
        levels = np.interp(np.asarray(t, dtype=np.float64), np.arange(len(finite)), finite)
        if self.zero_terminal_snr:
            levels = np.where(np.asarray(t) >= self.num_train_timesteps - 1, np.inf, levels)
        return levels if np.ndim(t) else float(levels)

    @overload
    def t(self, sigma: float) -> float: ...
    @overload
    def t(self, sigma: Array) -> Array: ...
    def t(self, sigma: ArrayLike) -> float | Array:
        """The (fractional) time of a noise level, linear in log sigma between the trained levels; ends held."""
        times = np.interp(
            np.log(np.maximum(sigma, self.sigmas[0])), np.log(self.sigmas), np.arange(self.num_train_timesteps)
        )
        return times if np.ndim(sigma) else float(times)

    def alpha_bar(self, t: int) -> float:
        """alphas_cumprod[t], and 1 at t = -1, before any noise. UsageError outside -1 .. T-1."""
        if not -1 <= t < self.num_train_timesteps:
            raise UsageError(f"time {t} is outside this schedule; allowed are 0 to {self.num_train_timesteps - 1}")
        return 1.0 if t == -1 else float(self.alphas_cumprod[t])

    def q_step(self, t: int) -> Gaussian:
        """q(x_t | x_{t-1}): Ho et al. 2020, eq. 2. t in 0 .. T-1."""
        beta = self._beta(t, t - 1)
        return Gaussian((1 - beta) ** 0.5, beta)

    def q_marginal(self, t: int) -> Gaussian:
        """q(x_t | x0): Ho et al. 2020, eq. 4. t in -1 .. T-1."""
        alpha_bar = self.alpha_bar(t)
        return Gaussian(alpha_bar**0.5, 1 - alpha_bar)

    def q_posterior(self, t: int, previous: int | None = None) -> Posterior:
        """q(x_{t-1} | x_t, x0): Ho et al. 2020, eqs. 6-7. With `previous` < t, the respaced q(x_previous | x_t, x0).

        At zero terminal SNR the coefficient of x_T is exactly 0: nothing but x0 says where to go.
        """
        previous = t - 1 if previous is None else previous
        beta, noise = self._beta(t, previous), 1 - self.alpha_bar(t)
        noise_previous = 1 - self.alpha_bar(previous)
        x0_coefficient = self.alpha_bar(previous) ** 0.5 * beta / noise
        return Posterior(x0_coefficient, (1 - beta) ** 0.5 * noise_previous / noise, beta * noise_previous / noise)

    def variance(self, t: int, kind: Variance = "fixed_small", previous: int | None = None) -> float:
        """Variance of DDPM's reverse step at t: the posterior's (fixed_small) or beta (fixed_large); section 3.2."""
        choose("variance", kind, FIXED)
        previous = t - 1 if previous is None else previous
        return self._beta(t, previous) if kind == "fixed_large" else self.q_posterior(t, previous).variance

    def _beta(self, t: int, previous: int) -> float:
        """The variance added between two times: beta_t for neighbours."""
        if not -1 <= previous < t:
            raise UsageError(
                f"a step from time {previous} to {t} does not add noise; the first must be the smaller, at least -1"
            )
        return 1 - self.alpha_bar(t) / self.alpha_bar(previous)
