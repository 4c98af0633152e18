"""One solver family a file, each a stateless generator over a Denoiser; the table SCHEDULERS; reading diffusers'
configs.
"""

from ldm.schedulers.config import FALLBACK, SUBSTITUTED, Sampling, from_config, network_of
from ldm.schedulers.ddim import ddim
from ldm.schedulers.ddpm import ddpm
from ldm.schedulers.dpm_solver import dpmpp_2m
from ldm.schedulers.euler import euler, euler_ancestral
from ldm.schedulers.heun import heun
from ldm.schedulers.solver import Noise, Solver, Step
from ldm.schedulers.table import SCHEDULERS, Option, Scheduler, find

__all__ = [
    "FALLBACK",
    "SCHEDULERS",
    "SUBSTITUTED",
    "Noise",
    "Option",
    "Sampling",
    "Scheduler",
    "Solver",
    "Step",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "find",
    "from_config",
    "heun",
    "network_of",
]
