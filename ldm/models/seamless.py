"""Pictures whose opposite sides join: every convolution reads on at the other side of its map.

Beyond the border of its map a convolution reads zeros. Where it reads the opposite side instead, the map is a cylinder
(one axis) or a torus (two) on which no column is the first. Norms and attention treat all pixels alike, so what such a
network draws repeats without a seam, and a picture rolled by the networks' total stride is the same picture rolled.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.errors import UsageError, choose

AXES = ("x", "y", "xy")
"""x joins left and right, y top and bottom."""


@contextmanager
def seamless(axes: str) -> Iterator[None]:
    """Within it, every torch.conv2d that this thread calls pads in a circle along `axes`, of AXES or "" (then nothing
    is changed), and with zeros along the other; so does F.pad where it puts zeros around a map [B, C, H, W].

    No network changes, and other threads do not notice. Nested, axes add up. Wrap network calls, not a generator's
    `yield`, behind which the caller's own convolutions would be meant too. UsageError: unknown axes.
    """
    if not axes:
        yield
        return
    with _Joined(choose("seamless axes", axes, AXES)):
        yield


def refuse_unjoined(axes: str, height: int, width: int, multiple: int) -> None:
    """UsageError for unknown axes, and for a joined side (in pixels) that is no multiple of `multiple`: the
    autoencoder's factor times 2 ** (levels of the U-Net - 1). Halving an uneven map would leave a seam.
    """
    if axes:
        choose("seamless axes", axes, AXES)
    sides = {"x": ("width", width), "y": ("height", height)}
    wrong = [sides[axis] for axis in axes if sides[axis][1] % multiple]
    if wrong:
        came = " and ".join(f"{name} is {side}" for name, side in wrong)
        near = " and ".join(f"a {name} of {_nearest(side, multiple)}" for name, side in wrong)
        raise UsageError(f"{came}; seamless {axes!r} joins sides that are multiples of {multiple}; take {near}")


def _nearest(side: int, multiple: int) -> str:
    """The multiples around a side, but 0."""
    below = side // multiple * multiple
    return " or ".join(str(n) for n in (below, below + multiple) if n)


class _Joined(TorchFunctionMode):
    """What torch asks before each of its functions, in this thread alone."""

    def __init__(self, axes: str) -> None:
        self.axes = axes

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(func)  # whatever is called from here on meets the modes outside this one alone
        named = kwargs or {}
        return rule(self.axes, *args, **named) if rule else func(*args, **named)


def _conv2d(
    axes: str, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """torch.conv2d, whose padding must be a number or a pair (rows, columns), not a word."""
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    x, (columns, _, rows, _) = _wrapped(axes, input, (columns, columns, rows, rows))
    return F.conv2d(x, weight, bias, stride, (rows, columns), dilation, groups)


def _pad(axes: str, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """F.pad, which autoencoders call before they halve a map."""
    if x.dim() == 4 and mode == "constant" and not value:
        x, pad = _wrapped(axes, x, pad)
    return F.pad(x, pad, mode, value)


RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {torch.conv2d: _conv2d, F.pad: _pad}


def _wrapped(axes: str, x: Tensor, pad: Sequence[int]) -> tuple[Tensor, list[int]]:
    """x [B, C, H, W] with pad = (left, right, top, bottom) columns and rows of its other side around it along `axes`,
    and the padding that is left for the other axis.
    """
    left = list(pad)
    for i, axis in enumerate("xy"):
        before, after = left[2 * i : 2 * i + 2] or (0, 0)
        if axis in axes and (before or after):
            dim, side = -1 - i, x.shape[-1 - i]
            ends = x.narrow(dim, side - before, before), x.narrow(dim, 0, after)
            # Empty ends, as F.pad(mode="circular"), would lose a channels_last format.
            x = torch.cat([part for part in (ends[0], x, ends[1]) if part.shape[dim]], dim)
            left[2 * i : 2 * i + 2] = 0, 0
    return x, left
