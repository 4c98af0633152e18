"""A small toolkit for latent diffusion models. The public names load with their first use: `import ldm` loads no torch.

>>> import ldm
>>> pipeline = ldm.Pipeline.from_pretrained()  # the model in the box
>>> pipeline("a taco on a red background", seed=7).images[0].save("taco.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline, Result
    from ldm.request import Request
    from ldm.training.lora import train_lora

__version__ = "0.1.0"
__all__ = ["Pipeline", "Request", "Result", "__version__", "train_lora"]

_HOMES = {
    "Pipeline": "ldm.pipeline",
    "Request": "ldm.request",
    "Result": "ldm.pipeline",
    "train_lora": "ldm.training.lora",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in (PEP 562) and keep it. AttributeError: not a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
