"""Pictures of any size in batches of one: aspect-ratio buckets, and how a picture comes to fill its bucket."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import UsageError
from ldm.images import to_tensor

SHOWN = 8  # buckets that the sentence about them names


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Bucketing:
    """Which sizes pictures may be trained at. All in pixels.

    resolution: the largest area of a bucket is resolution^2. step: sides are multiples of it (kohya's
    bucket_reso_steps; it must be a multiple of what the networks halve). min_side, max_side: of the table's buckets;
    None: half and twice the resolution, which for 512 are kohya's 256 and 1024 and for 1024 the SDXL paper's 512 and
    2048. Both the resolution itself: the square alone, as in diffusers' scripts. upscale: whether a picture smaller
    than its bucket is enlarged (kohya's default); if not, it gets a smaller bucket of its own.
    """

    resolution: int = 512
    step: int = 64
    min_side: int | None = None
    max_side: int | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        least, most = self.sides
        if not 1 <= self.step <= self.resolution:
            raise UsageError(
                f"the step of the buckets is {self.step}; it must be 1 to the resolution, {self.resolution}"
            )
        if not self.step <= least <= self.resolution <= most:
            raise UsageError(
                f"buckets with sides of {least} to {most}; the least must be at least the step, {self.step}, and the "
                f"resolution, {self.resolution}, between the two"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """The least and the largest side of a table's bucket."""
        least = max(self.step, self.resolution // 2) if self.min_side is None else self.min_side
        return least, 2 * self.resolution if self.max_side is None else self.max_side


def table(area: int, step: int, least: int, most: int) -> list[Size]:
    """For every width the largest height whose product is at most `area`, the same turned, and the largest square;
    sorted. NovelAI's rule ("Custom Batch Generation", novelai-aspect-ratio-bucketing), with kohya's square in place of
    its 512x512.
    """
    square = math.isqrt(area) // step * step
    found = {Size(square, square)}
    for side in range(-(-least // step) * step, most + 1, step):
        other = min(most, area // side) // step * step
        if other >= least:
            found |= {Size(side, other), Size(other, side)}
    return sorted(found)


def bucket_of(size: Size, options: Bucketing, sizes: Sequence[Size]) -> Size:
    """The bucket of a picture: that of the `table` nearest in aspect ratio (kohya's and NovelAI's measure, the
    difference of width / height).

    Without upscaling, a picture that does not cover it keeps its size: up to the longest side and, shrunk, the largest
    area, and rounded down to the step. (kohya's bucket_no_upscale does so to all: more buckets, and smaller ones.)
    """
    aspect = size.width / size.height
    nearest = min(sizes, key=lambda bucket: abs(bucket.width / bucket.height - aspect))
    if options.upscale or (size.width >= nearest.width and size.height >= nearest.height):
        return nearest
    own = [min(side, options.sides[1]) for side in size]
    share = min(1.0, options.resolution / math.sqrt(math.prod(own)))
    return Size(*(int(side * share) // options.step * options.step for side in own))


@dataclass(frozen=True)
class Buckets:
    """Samples by the size they are trained at. Its text is a sentence: "2 buckets: 512x512 (120), 640x384 (7)"."""

    sizes: tuple[Size, ...]  # those in use, sorted
    members: tuple[tuple[int, ...], ...]  # the samples of each, rising

    def __str__(self) -> str:
        rows = sorted(zip(self.sizes, self.members, strict=True), key=lambda row: -len(row[1]))
        named = [f"{size} ({len(members)})" for size, members in rows[:SHOWN]]
        named += [f"{len(rows) - SHOWN} smaller ones"] if len(rows) > SHOWN else []
        return f"{len(rows)} bucket{'s'[: len(rows) != 1]}: {', '.join(named)}"


def assign(sizes: Iterable[tuple[int, int]], options: Bucketing) -> Buckets:
    """The buckets of pictures of these (width, height).

    UsageError for no pictures, or for one that is smaller than the step while pictures are not enlarged.
    """
    least, most = options.sides
    possible = table(options.resolution**2, options.step, least, most)
    members: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        bucket = bucket_of(Size(*size), options, possible)
        if not all(bucket):
            raise UsageError(
                f"picture {index + 1} has {Size(*size)} pixels and no bucket, whose sides are multiples of "
                f"{options.step}; remove it, lower the step of the buckets, or let pictures be enlarged"
            )
        members.setdefault(bucket, []).append(index)
    if not members:
        raise UsageError("there are no pictures to sort into buckets; give at least one")
    return Buckets(tuple(sorted(members)), tuple(tuple(members[size]) for size in sorted(members)))


@dataclass(frozen=True)
class Placement:
    """How a picture fills its bucket: resized, mirrored if flipped, then cut from (left, top) on."""

    original: Size
    resized: Size
    target: Size
    top: int
    left: int
    flipped: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's conditioning (Podell et al. 2023, sec. 2.2): height and width before resizing, top and left of the
        cut, height and width of the bucket. As diffusers' train_text_to_image_sdxl.py, where the last two are its one
        resolution; `left` counts from the edge of the mirrored picture, as there.
        """
        (width, height), (to_width, to_height) = self.original, self.target
        return height, width, self.top, self.left, to_height, to_width


def place(
    original: Size,
    bucket: Size,
    dice: np.random.Generator | None = None,
    random_crop: bool = False,
    random_flip: bool = False,
) -> Placement:
    """The placement of a picture of that size: the smallest that covers the bucket, in the picture's aspect ratio.

    dice: decides on the cut and the mirroring, if these are random (UsageError without); both are always drawn, so that
    one option does not change the other's. The cut is central otherwise, rounded as torchvision does.
    """
    if dice is None and (random_crop or random_flip):
        raise UsageError("a random crop or flip without dice; give those of the sample")
    (width, height), (to_width, to_height) = original, bucket
    if width * to_height > to_width * height:  # wider than the bucket
        resized = Size((2 * width * to_height + height) // (2 * height), to_height)
    else:
        resized = Size(to_width, (2 * height * to_width + width) // (2 * width))
    room = (resized.height - to_height, resized.width - to_width)
    top, left = (round(free / 2) for free in room)
    if dice is not None:
        drawn = dice.random(3)
        if random_crop:
            top, left = (int(share * (free + 1)) for share, free in zip(drawn[:2], room, strict=True))
        return Placement(original, resized, bucket, top, left, random_flip and bool(drawn[2] < 0.5))
    return Placement(original, resized, bucket, top, left)


def pixels(image: Image.Image, placement: Placement) -> Tensor:
    """An RGB picture in its bucket: float32 [3, H, W] in [-1, 1], resized with Lanczos' filter.

    UsageError when the picture is not of the placement's original size.
    """
    return to_tensor([_cut(image, placement, Image.Resampling.LANCZOS)])[0]


def coverage(mask: Image.Image, placement: Placement) -> Tensor:
    """A picture's mask ("L", white where the loss counts) by the same geometry: float32 [1, H, W] in [0, 1].

    Bilinear, for Lanczos' filter adds ripples beside edges. UsageError as `pixels`.
    """
    cut = _cut(mask, placement, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255.0)[None]


def prepare(
    image: Image.Image,
    bucket: Size,
    dice: np.random.Generator | None = None,
    random_crop: bool = False,
    random_flip: bool = False,
) -> tuple[Tensor, Placement]:
    """`place` and `pixels` in one."""
    placement = place(Size(*image.size), bucket, dice, random_crop, random_flip)
    return pixels(image, placement), placement


def _cut(image: Image.Image, placement: Placement, filter: Image.Resampling) -> Image.Image:
    if image.size != placement.original:
        raise UsageError(f"a picture or mask of {Size(*image.size)} pixels where {placement.original} were expected")
    image = image if image.size == placement.resized else image.resize(placement.resized, filter)
    if placement.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    (width, height), top, left = placement.target, placement.top, placement.left
    return image.crop((left, top, left + width, top + height))
