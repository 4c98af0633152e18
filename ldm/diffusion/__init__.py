"""The mathematics that training and sampling share: schedules, predictions, noise levels, guidance, losses."""

from ldm.diffusion.guidance import guided, guided_rescaled
from ldm.diffusion.losses import DiffusionLoss, min_snr_weights
from ldm.diffusion.prediction import PREDICTIONS, Denoiser, Estimate, Prediction, c_in
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.spacing import Levels, Spacing, levels

__all__ = [
    "PREDICTIONS",
    "Denoiser",
    "DiffusionLoss",
    "Estimate",
    "Levels",
    "NoiseSchedule",
    "Prediction",
    "Spacing",
    "c_in",
    "guided",
    "guided_rescaled",
    "levels",
    "min_snr_weights",
]
