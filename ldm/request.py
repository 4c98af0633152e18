"""One order for images. Command-line flags, JSON bodies and keyword arguments are all made from it; all its
validation is here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.errors import UsageError, choose

LARGEST_SIDE = 16384  # pixels; what memory allows is asked of the machine before drawing
MOST_IMAGES = 10_000
LARGEST_SEED = 2**63 - 1
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


def _option(default: Any, help: str, flag: str = "") -> Any:
    """A field with its one-line description and, where it differs from the name, its command-line flag."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True)
class Request:
    """What to draw and how. Names and meanings are diffusers'; None leaves the choice to the model (its
    generation_config.json).

    Image i of prompt j is number j * num_images_per_prompt + i and is drawn from seed + that number, or from its own
    entry of a tuple of seeds. Raises UsageError, in one sentence, for any value out of range.
    """

    prompt: str | tuple[str, ...] = _option((), "what to draw; several prompts are drawn in order")
    negative_prompt: str | tuple[str, ...] = _option(
        "", "what to keep away from; one for all prompts, or one for each", "negative"
    )
    num_images_per_prompt: int = _option(1, "pictures of each prompt", "n")
    seed: int | tuple[int, ...] | None = _option(
        None, "number the first picture's noise comes from; the next ones count up; drawn if absent"
    )
    num_inference_steps: int | None = _option(None, "steps from noise to picture", "steps")
    guidance_scale: float | None = _option(
        None, "how strongly to follow the prompt; 1 = not at all beyond the model's own inclination", "guidance"
    )
    guidance_rescale: float = _option(0.0, "0..1: take back the contrast that guidance adds (Lin et al. 2023)")
    height: int | None = _option(None, "pixels")
    width: int | None = _option(None, "pixels")
    scheduler: str | None = _option(
        None, "how to step from noise to picture: a short name, diffusers' class name or A1111's name"
    )
    eta: float | None = _option(None, "0..1: fresh noise of DDIM and Euler a")
    clip_skip: int | None = _option(
        None, "how many of the text encoder's last layers the prompt skips (diffusers' counting)"
    )
    output_type: str = _option(
        "pil", "pil, pt (tensor [B, 3, H, W] in 0..1), np (array [B, H, W, 3] in 0..1) or latent"
    )

    def __post_init__(self) -> None:
        for name, absent in (("prompt", ()), ("negative_prompt", ""), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, list) or value is None:
                object.__setattr__(self, name, absent if value is None else tuple(value))
        for text in self.prompts if isinstance(self.prompt, str | tuple) else (self.prompt,):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"prompt is {text!r}; it must be words, for example 'a taco on a red background'")
        negative = self.negative_prompt
        if not isinstance(negative, str | tuple) or not all(isinstance(text, str) for text in negative):
            raise UsageError(f"negative_prompt is {negative!r}; it must be words, or one text for each prompt")
        if not isinstance(self.scheduler, str | None):
            raise UsageError(f"scheduler is {self.scheduler!r}; it must be a name, for example 'ddim'")
        self._whole("num_images_per_prompt", 1, MOST_IMAGES)
        self._whole("num_inference_steps", 1, 1000)
        self._whole("height", 1, LARGEST_SIDE)
        self._whole("width", 1, LARGEST_SIDE)
        self._whole("clip_skip", 0, 100)
        self._number("guidance_scale", 0, 1000)
        self._number("guidance_rescale", 0, 1)
        self._number("eta", 0, 1)
        choose("output_type", str(self.output_type), OUTPUT_TYPES)
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            if seed is not None and (
                isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED - MOST_IMAGES
            ):
                raise UsageError(f"seed is {seed!r}; it must be a whole number from 0 to {LARGEST_SEED - MOST_IMAGES}")
        if len(self.negative_prompts) not in (0, 1, len(self.prompts)) and self.prompts:
            raise UsageError(
                f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts; give one, or "
                f"one for each"
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as a tuple, also where one was given."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompts as a tuple, as given."""
        return (self.negative_prompt,) if isinstance(self.negative_prompt, str) else self.negative_prompt

    def seeds(self, images: int) -> tuple[int, ...]:
        """The seed of each of `images` pictures. UsageError when a tuple of seeds has another length."""
        if isinstance(self.seed, tuple):
            if len(self.seed) != images:
                raise UsageError(
                    f"{len(self.seed)} seeds for {images} pictures; give one for each, or one number to count up from"
                )
            return self.seed
        if self.seed is None:
            raise UsageError("no seed was chosen yet; Pipeline draws one where the request has none")
        return tuple(self.seed + i for i in range(images))

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and Request.__dataclass_fields__[name].default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None and Request.__dataclass_fields__[name].default is None:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}; it must be a number from {low} to {high}")


def make_request(prompt: str | Sequence[str] | Request | None, options: dict[str, Any]) -> Request:
    """A Request of keyword arguments, or a given one with some fields replaced. UsageError names an unknown field's
    nearest.
    """
    names = [f.name for f in fields(Request)]
    for name in options:
        choose("argument", name, names)
    if isinstance(prompt, Request):
        given = {name: getattr(prompt, name) for name in names}
    else:
        several = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        given = {} if prompt is None else {"prompt": tuple(prompt) if several else prompt}
    return Request(**(given | options))
