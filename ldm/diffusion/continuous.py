"""Noise levels of networks that were trained on all of a range instead of on a table: EDM and flow matching."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ldm.diffusion.schedule import Array


@dataclass(frozen=True)
class EDMSchedule:
    """Levels of Karras et al. 2022 (arXiv:2206.00364): the network is told c_noise = log(sigma) / 4.

    sigma_min, sigma_max: the range it was trained on. rho, exponential: how a run is spaced when none is chosen:
    eq. 5, or evenly in log sigma.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    exponential: bool = False
    num_train_timesteps: int = 1000

    def t(self, sigma: ArrayLike) -> Array:
        """What the network is told at a level."""
        return np.asarray(np.log(sigma) / 4, dtype=np.float64)

    def sigma(self, t: ArrayLike) -> Array:
        """The level at a time."""
        return np.asarray(np.exp(4 * np.asarray(t)), dtype=np.float64)


@dataclass(frozen=True)
class FlowSchedule:
    """Levels of flow matching: x_t = (1 - s) x0 + s noise, so that sigma = s / (1 - s) and the network is told T s.

    Lipman et al. 2023 (arXiv:2210.02747). shift: moves the times of a run towards noise, s -> shift s / (1 + (shift -
    1) s): Esser et al. 2024 (arXiv:2403.03206), eq. 23. shift_terminal: the last s, to which all are then stretched.
    twice: the lowest s = 1 / T is shifted too before the times are laid out, as in diffusers' FlowMatchEulerDiscrete.
    """

    shift: float = 1.0
    shift_terminal: float | None = None
    twice: bool = True
    num_train_timesteps: int = 1000

    @cached_property
    def rates(self) -> tuple[Array, Array]:
        """Signal and noise rate, 1 - s and s, of the levels s = shifted(1 / T) ... 1 of training: float64 [T]."""
        s = self.shifted(np.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps)
        return 1 - s, s

    @property
    def told(self) -> Array:
        """What the network is told at every level of training: T s, float64 [T]."""
        return self.num_train_timesteps * self.rates[1]

    def shifted(self, s: ArrayLike) -> Array:
        """s in 0..1 -> moved towards 1 by `shift`."""
        part = np.asarray(s, dtype=np.float64)
        return np.asarray(self.shift * part / (1 + (self.shift - 1) * part))

    def t(self, sigma: ArrayLike) -> Array:
        """What the network is told at a level, 0..T."""
        level = np.asarray(sigma, dtype=np.float64)
        return np.asarray(self.num_train_timesteps * level / (1 + level))

    def sigma(self, t: ArrayLike) -> Array:
        """The level at a time; a finite stand-in at T, which float32 cannot tell from infinity."""
        s = np.minimum(np.asarray(t, dtype=np.float64) / self.num_train_timesteps, 1 - 1e-9)
        return np.asarray(s / (1 - s))
