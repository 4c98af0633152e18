"""The patch discriminator of Isola et al. 2017 (sec. 3.2.2): is a patch of an image real or decoded?."""

import math

from torch import Tensor, nn


class PatchGAN(nn.Module):
    """Convolutions that give one logit a patch; with layers = 3 a patch is 70 x 70 pixels.

    Normalised by groups within an image instead of over the batch: the same numbers in train and eval mode and for
    any batch size, and the verdict on one image does not depend on the others it came with.
    width: channels of the first layer, doubled by every further one up to 8 times.
    layers: number of halvings of the resolution.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c_in = width
        for i in range(1, layers + 1):
            c_out = width * min(2**i, 8)
            parts += [
                nn.Conv2d(c_in, c_out, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, c_out), c_out),
                nn.LeakyReLU(0.2),
            ]
            c_in = c_out
        parts.append(nn.Conv2d(c_in, 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)  # the paper's initialisation (app. 6.2)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> logits [B, 1, H/8 - 2, W/8 - 2] (for layers = 3); large means real."""
        logits: Tensor = self.layers(images)
        return logits
