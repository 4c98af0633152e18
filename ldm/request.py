"""One order for images. Command-line flags, JSON bodies and keyword arguments are all made from it; all its
validation is here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from ldm.errors import UsageError, choose

LARGEST_SIDE = 16384  # pixels; what memory allows is asked of the machine before drawing
MOST_IMAGES = 10_000
LARGEST_SEED = 2**63 - 1
SEEDS = ("seed", "variation_seed")
XL = "SDXL"
EDIT = "Editing a picture"  # where help pages show the fields of it
SEAMLESS = ("x", "y", "xy")
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
PROFILES = ("diffusers", "a1111")
NOISE_SOURCES = ("cpu", "gpu")

SPANS = {"the run": ("denoising_start", "denoising_end"), "guidance": ("guidance_start", "guidance_stop")}
BESIDE = {  # fields -> those of which one must be there for them to mean anything
    ("strength", "mask_image", "extend", "fit", "source_prompt", "image_guidance_scale"): ("image",),
    ("mask_invert", "mask_grow", "mask_feather", "padding_mask_crop", "fill", "resample"): ("mask_image", "extend"),
}


def flag_of(field: "Field[Any]") -> str:
    """The command-line flag of a field of Request: --steps, --guidance, -n."""
    name = field.metadata["flag"] or field.name.replace("_", "-")
    return f"-{name}" if len(name) == 1 else f"--{name}"


def _option(default: Any, help: str, flag: str = "", of: str = "", panel: str = "") -> Any:
    """A field with its one-line description, its command-line flag where that differs from the name, the one family of
    models that heeds it, and where help pages show it, if that is not among the others.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "of": of, "panel": panel})


def _edit(default: Any, help: str, flag: str = "") -> Any:
    return _option(default, help, flag, panel=EDIT)


@dataclass(frozen=True)
class Request:
    """What to draw and how. Names and meanings are diffusers'; None leaves the choice to the model (its
    generation_config.json).

    Image i of prompt j is number k = j * num_images_per_prompt + i and is drawn from seed + k, or from its own entry of
    a tuple of seeds. With a variation_strength all pictures keep one seed, and variation_seed counts up instead.
    Raises UsageError, in one sentence, for any value out of range.
    """

    prompt: str | tuple[str, ...] = _option((), "what to draw; several prompts are drawn in order")
    negative_prompt: str | tuple[str, ...] = _option(
        "", "what to keep away from; one for all prompts, or one for each", "negative"
    )
    num_images_per_prompt: int = _option(1, "pictures of each prompt", "n")
    seed: int | tuple[int, ...] | None = _option(
        None, "number the first picture's noise comes from; the next ones count up; drawn if absent"
    )
    variation_strength: float = _option(
        0.0, "0..1: draw variations of the seed's picture, their noise turned so far towards other noise"
    )
    variation_seed: int | tuple[int, ...] | None = _option(
        None, "number the other noise of the first variation comes from; the next ones count up; drawn if absent"
    )
    num_inference_steps: int | None = _option(None, "steps from noise to picture", "steps")
    nfe: int | None = _option(None, "network calls to spend in place of steps; as many steps as fit are taken")
    guidance_scale: float | None = _option(
        None, "how strongly to follow the prompt; 1 = not at all beyond the model's own inclination", "guidance"
    )
    guidance_rescale: float = _option(0.0, "0..1: take back the contrast that guidance adds (Lin et al. 2023)")
    guidance_start: float = _option(
        0.0, "0..1: share of the steps before guidance begins; they ask the prompt alone, which is half the work"
    )
    guidance_stop: float = _option(1.0, "0..1: share of the steps after which guidance ends; the others do likewise")
    height: int | None = _option(None, "pixels")
    width: int | None = _option(None, "pixels")
    scheduler: str | None = _option(
        None, "how to step from noise to picture: a short name, diffusers' class name or A1111's name"
    )
    schedule_type: str | None = _option(
        None, "noise levels to visit: karras, exponential, beta, sgm_uniform, ays ... or leading, trailing, linspace"
    )
    timesteps: tuple[float, ...] = _option((), "the times to visit, falling, in place of steps; repeat the flag")
    timestep_respacing: str | None = _option(
        None, "so many times of each section, in place of steps: '250', '10,15,20' or 'ddim50' (Nichol & Dhariwal)"
    )
    sigmas: tuple[float, ...] = _option((), "the noise levels to visit, falling, in place of steps; repeat the flag")
    eta: float | None = _option(None, "0..1: fresh noise of DDIM, TCD and the ancestral schedulers")
    clip_skip: int | None = _option(
        None, "layer of the text encoder that is read, from the last: 1 = last, 2 = the one before (A1111's counting)"
    )
    literal: bool = _option(False, "take prompts as they stand: no weights, schedules, {choices} or __lists__")
    profile: str | None = _option(
        None, "draw as another tool does: diffusers or a1111 (noise, weights, noise levels, clip skip)"
    )
    noise_source: str | None = _option(
        None, "whose numbers a seed gives: cpu (diffusers) or gpu (an NVIDIA card's, A1111); absent = the profile's"
    )
    eta_noise_seed_delta: int = _option(0, "added to the seed for all noise after the first (A1111's ENSD)")
    image: str | Any = _edit(
        None, "picture to begin with: a file (in Python also a PIL image); with a mask it is kept outside of it"
    )
    strength: float | None = _edit(
        None, "0..1: how much of the way from noise is drawn anew; absent = 0.8, with a mask 1; 1 = from noise alone"
    )
    mask_image: str | Any = _edit(
        None,
        "what is drawn anew: a file (white; gray = less strongly), alpha (what is transparent), box:L,T,R,B, "
        "ellipse:L,T,R,B or polygon:X,Y,X,Y,X,Y in pixels or per cent, several joined by +",
        "mask",
    )
    mask_invert: bool = _edit(False, "draw anew what the mask would keep")
    mask_grow: int = _edit(0, "pixels that the mask grows by; below 0 it shrinks")
    mask_feather: int = _edit(0, "pixels inside the mask's edge over which the new picture fades into the old one")
    padding_mask_crop: int | None = _edit(
        None, "draw only the mask's surroundings, with so many pixels of padding, in the full size", "only-masked"
    )
    extend: str | None = _edit(None, "make the picture larger and draw what is new: left=128,top=25% ...")
    fill: str | None = _edit(
        None, "what lies under the mask at first: original, smooth, noise or gray; when extending edge, mirror ... too"
    )
    fit: str | None = _edit(None, "how a picture of another size is brought to the size asked for: stretch, crop, pad")
    resample: int = _edit(1, "how often every stretch of an inpainting run is walked (RePaint); more joins better")
    resample_jump: int = _edit(1, "how many steps such a stretch has")
    image_guidance_scale: float | None = _edit(
        None, "how strongly to follow the picture, of models that edit by instructions; absent = 1.5", "image-guidance"
    )
    source_prompt: str | None = _edit(
        None, "what the picture shows: begin from the noise that it comes from (DDIM inversion), not from a seed's",
        "source",
    )  # fmt: skip
    noise: str | Any = _edit(None, "file of `ldm invert`: begin with the noise in it in place of a seed's")
    convert_image: bool = _edit(
        False, "take pictures that are not of 8-bit RGB(A): turned by EXIF, CMYK, 16 bits, animated (the first frame)"
    )
    seamless: str | None = _option(None, "x, y or xy: draw a texture that joins its own other side")
    original_height: int | None = _option(
        None, "height in pixels of the picture that this is told to be made from; absent = the height", of=XL
    )
    original_width: int | None = _option(None, "and its width", of=XL)
    crop_top: int = _option(0, "pixels told to be cut off at the top", of=XL)
    crop_left: int = _option(0, "and at the left", of=XL)
    aesthetic_score: float = _option(6.0, "how beautiful the refiner is told that the picture is", of=XL)
    negative_aesthetic_score: float = _option(2.5, "and how beautiful what it keeps away from", of=XL)
    refiner_start: float = _option(0.8, "0..1: where the refiner goes on, if there is one", of=XL)
    denoising_start: float = _option(0.0, "0..1: begin where another model ended, with its latents", of=XL)
    denoising_end: float = _option(1.0, "0..1: stop so far, for another model to go on", of=XL)
    output_type: str = _option(
        "pil", "pil, pt (tensor [B, 3, H, W] in 0..1), np (array [B, H, W, 3] in 0..1) or latent"
    )

    def __post_init__(self) -> None:
        for name, absent in (("prompt", ()), ("negative_prompt", ""), *dict.fromkeys(SEEDS).items()):
            value = getattr(self, name)
            if isinstance(value, list) or value is None:
                object.__setattr__(self, name, absent if value is None else tuple(value))
        for text in self.prompts if isinstance(self.prompt, str | tuple) else (self.prompt,):
            if not isinstance(text, str) or not (text.strip() or self.source_prompt is not None):
                raise UsageError(f"prompt is {text!r}; it must be words, for example 'a taco on a red background'")
        negative = self.negative_prompt
        if not isinstance(negative, str | tuple) or not all(isinstance(text, str) for text in negative):
            raise UsageError(f"negative_prompt is {negative!r}; it must be words, or one text for each prompt")
        if not isinstance(self.scheduler, str | None):
            raise UsageError(f"scheduler is {self.scheduler!r}; it must be a name, for example 'ddim'")
        self._whole("num_images_per_prompt", 1, MOST_IMAGES)
        self._whole("num_inference_steps", 1, 1000)
        self._whole("nfe", 1, 4000)
        self._whole("eta_noise_seed_delta", 0, LARGEST_SEED - MOST_IMAGES)
        self._run()
        self._whole("height", 1, LARGEST_SIDE)
        self._whole("width", 1, LARGEST_SIDE)
        self._whole("clip_skip", 0 if self.profile == "diffusers" else 1, 100)
        self._number("guidance_scale", 0, 1000)
        self._number("guidance_rescale", 0, 1)
        self._number("eta", 0, 1)
        self._number("variation_strength", 0, 1)
        for name in ("original_height", "original_width"):
            self._whole(name, 1, LARGEST_SIDE)
        for name in ("crop_top", "crop_left"):
            self._whole(name, 0, LARGEST_SIDE)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            self._number(name, 0, 10)
        self._number("refiner_start", 0, 1)
        for what, names in SPANS.items():
            for name in names:
                self._number(name, 0, 1)
            start, end = (getattr(self, name) for name in names)
            if start >= end:
                raise UsageError(f"{names[0]} is {start} and {names[1]} {end}; {what} ends after it starts")
        self._editing()
        choose("output_type", str(self.output_type), OUTPUT_TYPES)
        for name in SEEDS:
            self._seeds(name)
        if self.variation_seed is not None and not self.variation_strength:
            raise UsageError(
                "variation_seed was given without variation_strength; give that too, a number above 0 and up to 1"
            )
        if len(self.negative_prompts) not in (0, 1, len(self.prompts)) and self.prompts:
            raise UsageError(
                f"{len(self.negative_prompts)} negative prompts for {len(self.prompts)} prompts; give one, or "
                f"one for each"
            )

    def _editing(self) -> None:
        """What says which picture is edited, and how; that nothing is said of a picture or mask that is not there."""
        for name in ("extend", "fill", "fit", "source_prompt", "seamless"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be text")
        for name in ("mask_invert", "convert_image"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.seamless is not None:
            choose("seamless", self.seamless, SEAMLESS)
        self._number("strength", 0, 1)
        self._number("image_guidance_scale", 0, 1000)
        self._whole("mask_grow", -LARGEST_SIDE, LARGEST_SIDE)
        for name in ("mask_feather", "padding_mask_crop"):
            self._whole(name, 0, LARGEST_SIDE)
        self._whole("resample", 1, 100)
        self._whole("resample_jump", 1, 1000)
        if self.seamless and self.padding_mask_crop is not None:
            raise UsageError(
                "seamless and padding_mask_crop were both given, and a part of a picture does not join itself"
            )
        if self.noise is not None and self.source_prompt is not None:
            raise UsageError("noise and source_prompt were both given, and each says what to begin with; give one")
        for names, needed in BESIDE.items():
            said = [n for n in names if getattr(self, n) != Request.__dataclass_fields__[n].default]
            if said and all(getattr(self, n) is None for n in needed):
                raise UsageError(f"{said[0]} was given without {' or '.join(needed)}; give that too, or leave it out")

    def _run(self) -> None:
        """What says which noise levels are visited, and as which tool; that it is said once."""
        for name, known in (("profile", PROFILES), ("noise_source", NOISE_SOURCES)):
            if getattr(self, name) is not None:
                choose(name, str(getattr(self, name)), known)
        for name in ("schedule_type", "timestep_respacing"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be text, for example 'karras' or '10,15'")
        if not isinstance(self.literal, bool):
            raise UsageError(f"literal is {self.literal!r}; it must be true or false")
        for name in ("timesteps", "sigmas"):
            values = getattr(self, name)
            values = () if values is None else (values,) if isinstance(values, int | float) else tuple(values)
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
                raise UsageError(f"{name} are {values!r}; they must be numbers that fall")
            object.__setattr__(self, name, values)
        said = [name for name in ("nfe", "timesteps", "timestep_respacing", "sigmas") if getattr(self, name)]
        if len(said) > 1:
            raise UsageError(f"{' and '.join(said)} each say how many steps to take; give one of them")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as a tuple, also where one was given."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def plain(self) -> bool:
        """Whether its prompts are words and nothing else."""
        return self.literal or self.profile == "diffusers"

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompts as a tuple, as given."""
        return (self.negative_prompt,) if isinstance(self.negative_prompt, str) else self.negative_prompt

    def seeds(self, images: int) -> tuple[int, ...]:
        """The seed of each of `images` pictures. UsageError when a tuple of seeds has another length."""
        return self._counted("seed", images, 0 if self.variation_strength else 1)

    def variation_seeds(self, images: int) -> tuple[int, ...] | None:
        """The variation seed of each of `images` pictures; None where no variation is asked for. Errors as `seeds`."""
        return self._counted("variation_seed", images, 1) if self.variation_strength else None

    def singles(self) -> "Iterator[Request]":
        """One request for each picture, in order. For a request whose seeds and sizes the Pipeline has resolved."""
        n, negatives = self.num_images_per_prompt, self.negative_prompts or ("",)
        count = n * len(self.prompts)
        varied = self.variation_seeds(count)
        for k, seed in enumerate(self.seeds(count)):
            yield replace(
                self,
                prompt=self.prompts[k // n],
                negative_prompt=negatives[k // n if len(negatives) > 1 else 0],
                num_images_per_prompt=1,
                seed=seed,
                variation_seed=varied and varied[k],
            )

    def _counted(self, name: str, images: int, step: int) -> tuple[int, ...]:
        value = getattr(self, name)
        if isinstance(value, tuple):
            if len(value) != images:
                raise UsageError(
                    f"{len(value)} {name}s for {images} pictures; give one for each, or one number to count up from"
                )
            return value
        if value is None:
            raise UsageError(f"no {name} was chosen yet; Pipeline draws one where the request has none")
        return tuple(value + step * i for i in range(images))

    def _seeds(self, name: str) -> None:
        value, most = getattr(self, name), LARGEST_SEED - MOST_IMAGES
        for seed in value if isinstance(value, tuple) else () if value is None else (value,):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= most:
                raise UsageError(f"{name} is {seed!r}; it must be a whole number from 0 to {most}")

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
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
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
