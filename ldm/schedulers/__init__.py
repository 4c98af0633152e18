"""One solver family a file, each the rule of one step over a Denoiser; the table SCHEDULERS; reading diffusers'
configs.
"""

from ldm.schedulers.config import Sampling, from_config, network_of, trained_on
from ldm.schedulers.solver import Noise, Past, Solver, Step, solve
from ldm.schedulers.table import SCHEDULERS, Option, Scheduler, find

__all__ = [
    "SCHEDULERS",
    "Noise",
    "Option",
    "Past",
    "Sampling",
    "Scheduler",
    "Solver",
    "Step",
    "find",
    "from_config",
    "network_of",
    "solve",
    "trained_on",
]
