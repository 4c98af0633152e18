"""What others call our schedulers and grids of noise levels: A1111 and ComfyUI. Plain data, for reading what their
pictures say and for the shell's completion; ldm.schedulers and ldm.diffusion.grids, which it describes, cost seconds to
import.
"""

from typing import NamedTuple


class Sampler(NamedTuple):
    """A scheduler elsewhere.

    a1111: its "Sampler", our own name where it has none. comfy: ComfyUI's sampler_name, "" where it has none (what it
    calls ddim is its Euler). exact: the profile "a1111" runs it as A1111 does, by k-diffusion's function or CompVis';
    else it runs as in diffusers. eta: it has one. noise: it can draw fresh noise along the run.
    """

    a1111: str
    comfy: str = ""
    exact: bool = True
    eta: bool = False
    noise: bool = False


SAMPLERS = {  # a row for each of ldm.schedulers.SCHEDULERS
    "ddpm": Sampler("DDPM", "ddpm", exact=False, noise=True),
    "ddim": Sampler("DDIM", eta=True, noise=True),
    "plms": Sampler("PLMS"),
    "lms": Sampler("LMS", "lms"),
    "euler": Sampler("Euler", "euler"),
    "euler_a": Sampler("Euler a", "euler_ancestral", eta=True, noise=True),
    "heun": Sampler("Heun", "heun"),
    "dpm2": Sampler("DPM2", "dpm_2"),
    "dpm2_a": Sampler("DPM2 a", "dpm_2_ancestral", eta=True, noise=True),
    "dpm++2s_a": Sampler("DPM++ 2S a", "dpmpp_2s_ancestral", eta=True, noise=True),
    "dpm++sde": Sampler("DPM++ SDE", "dpmpp_sde", eta=True, noise=True),
    "dpm++2m": Sampler("DPM++ 2M", "dpmpp_2m"),
    "dpm++2m_sde": Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", noise=True),
    "dpm++2m_sde_heun": Sampler("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", noise=True),
    "dpm++3m": Sampler("dpm++3m", exact=False),
    "dpm++3m_sde": Sampler("DPM++ 3M SDE", "dpmpp_3m_sde", noise=True),
    "dpm++2s": Sampler("dpm++2s", exact=False, noise=True),
    "dpm++3s": Sampler("dpm++3s", exact=False, noise=True),
    "dpm++1s": Sampler("dpm++1s", exact=False, noise=True),
    "dpm++1": Sampler("dpm++1", exact=False),
    "dpm++1_sde": Sampler("dpm++1_sde", exact=False, noise=True),
    "dpm_solver": Sampler("dpm_solver", exact=False),
    "dpm_solver_sde": Sampler("dpm_solver_sde", exact=False, noise=True),
    "unipc": Sampler("UniPC", "uni_pc_bh2", exact=False),
    "unipc_bh1": Sampler("unipc_bh1", "uni_pc", exact=False),
    "deis": Sampler("DEIS", "deis", exact=False),
    "lcm": Sampler("LCM", "lcm", exact=False, noise=True),
    "tcd": Sampler("TCD", exact=False, eta=True, noise=True),
}
GRIDS = {  # a row for each of ldm.diffusion.grids.GRIDS: A1111's "Schedule type", our own name where it has none
    "karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "lu": "lu", "beta": "Beta",
    "kl_optimal": "KL Optimal", "uniform": "Uniform", "normal": "Normal", "sgm_uniform": "SGM Uniform",
    "simple": "Simple", "ddim_uniform": "DDIM", "ays": "ays", "align_your_steps": "Align Your Steps",
}  # fmt: skip
SPACINGS = ("leading", "trailing", "linspace")
