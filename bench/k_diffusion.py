"""Write tests/data/k_diffusion.json: what k-diffusion's samplers make of a small network, on the levels that
stable-diffusion-webui 1.10 lays out for them.

    pip install scipy torchsde && pip install --no-deps k-diffusion==0.1.1.post1 torchdiffeq
    python bench/k_diffusion.py

Only k_diffusion.sampling and .external are imported; what the rest of that package wants is not. The network, where it
begins and its noise, a smooth function of the interval, are those of tests/solving.py; all is in float64 but the
levels, which k-diffusion makes in float32.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in place of this file's folder, where it hides the package

from solving import SMALL, field, network  # noqa: E402

from ldm.diffusion import NoiseSchedule  # noqa: E402

# label, function, its arguments, the grid of A1111's "Automatic", whether the last level but one is discarded:
# modules/sd_samplers_kdiffusion.py there
SAMPLERS: tuple[tuple[str, str, dict[str, str], str, bool], ...] = (
    ("Euler", "sample_euler", {}, "uniform", False),
    ("Euler a", "sample_euler_ancestral", {}, "uniform", False),
    ("LMS", "sample_lms", {}, "uniform", False),
    ("Heun", "sample_heun", {}, "uniform", False),
    ("DPM2", "sample_dpm_2", {}, "karras", True),
    ("DPM2 a", "sample_dpm_2_ancestral", {}, "karras", True),
    ("DPM++ 2S a", "sample_dpmpp_2s_ancestral", {}, "karras", False),
    ("DPM++ SDE", "sample_dpmpp_sde", {}, "karras", False),
    ("DPM++ 2M", "sample_dpmpp_2m", {}, "karras", False),
    ("DPM++ 2M SDE", "sample_dpmpp_2m_sde", {"solver_type": "midpoint"}, "exponential", False),
    ("DPM++ 2M SDE Heun", "sample_dpmpp_2m_sde", {"solver_type": "heun"}, "exponential", False),
    ("DPM++ 3M SDE", "sample_dpmpp_3m_sde", {}, "exponential", True),
)
NOISY = ("_ancestral", "_sde")


def k_diffusion() -> tuple[Any, Any]:
    """The modules `sampling` and `external` of the package, without its other ones."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("k-diffusion is not installed; see the top of this file")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")


def main() -> None:
    sampling, external = k_diffusion()
    alphas_cumprod = torch.tensor(NoiseSchedule.scaled_linear().alphas_cumprod)

    def told(x: Tensor, t: Tensor) -> Tensor:
        return network(x, float(t[0]))

    model = external.DiscreteEpsDDPMDenoiser(told, alphas_cumprod, quantize=False)
    low, high = model.sigmas[0].item(), model.sigmas[-1].item()
    grids = {
        "uniform": model.get_sigmas,
        "karras": lambda n: sampling.get_sigmas_karras(n, low, high),
        "exponential": lambda n: sampling.get_sigmas_exponential(n, low, high),
    }
    rows = []
    for label, function, arguments, automatic, discards in SAMPLERS:
        noise = {"noise_sampler": field_of_small} if function.endswith(NOISY) else {}
        for grid in dict.fromkeys((automatic, "karras")):
            for n in (5, 20):
                sigmas = grids[grid](n + discards)
                if discards:
                    sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
                sigmas = sigmas.double()
                x = SMALL.double() * sigmas[0]
                end = getattr(sampling, function)(model, x, sigmas, disable=True, **arguments, **noise)
                rows.append({
                    "label": label, "grid": grid, "automatic": grid == automatic, "n": n,
                    "sigmas": [float(f"{level:.9g}") for level in sigmas.tolist()],
                    "x": [float(f"{value:.10g}") for value in end.flatten().tolist()],
                })  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    (ROOT / "tests/data/k_diffusion.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def field_of_small(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return field(float(sigma), float(sigma_next), SMALL).double()


if __name__ == "__main__":
    main()
