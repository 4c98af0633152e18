"""From a picture back to the noise that draws it: DDIM with eta 0, walked up the levels.

Song et al. 2021 (arXiv:2010.02502), section 4.3; with iterations, Pan et al. 2023 (arXiv:2309.04907) and Garibi et al.
2024 (arXiv:2403.14602).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoiser, c_in
from ldm.schedulers.solver import Step

ITERATIONS = 3  # of the model in the box, over 50 steps, the worst of 8 pictures comes back at 51 dB; at 1, at 13 dB


def invert(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    iterations: int = ITERATIONS,
    resume: Step | None = None,
) -> Iterator[Step]:
    """Walk a clean x [B, C, H, W] from sigmas[-1], the lowest of n + 1 falling levels, up to sigmas[0], so that `ddim`
    with eta 0 (`euler`) brings it back.

    Yields n Steps: sigma is the level reached and x0 the estimate there. A run from x of the last Step is one from the
    unit noise x / Levels.start; nothing of x is lost in that at a level which stands for infinity, where the network
    sees the unit noise alone. iterations: network calls a step; 1 is plain DDIM inversion, which takes the noise in x
    at the level below for that at the level above. resume: go on after this Step, with the same bits.

    A step down, F(x) = x0(x, high) + r (x - x0(x, high)) with r = low / high, is solved for F(x) = target: x <- x +
    (target - F(x)) / (r + (1 - r) c_in(high)^2), which for data of unit Gaussians is the solution at once, since x0 is
    then c_in^2 x. It is also where r is 0, in the step to a clean picture. Of each picture the x is kept that missed
    its target least, so further iterations do no harm.
    """
    x, x0, begin = (resume.x, resume.x0, resume.index + 1) if resume else (x, x, 0)
    rising = list(zip(sigmas[-2::-1], sigmas[:0:-1], strict=True))
    for index, (high, low) in enumerate(rising[begin:], begin):
        target, r = x, low / high
        kept: tuple[Tensor, ...] = ()
        guess = x0 + (x - x0) / r if r else x
        for _ in range(iterations):
            said = denoise(guess, high).x0
            missing = target - said.lerp(guess, r)
            miss = missing.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            found = (miss, guess, said)
            kept = (
                tuple(torch.where(miss < kept[0], *pair) for pair in zip(found, kept, strict=True)) if kept else found
            )
            guess = guess + missing / (r + (1 - r) * c_in(high) ** 2)
        _, x, x0 = kept
        yield Step(index, high, x, x0, (index + 1) * iterations)
