"""What is said of a picture this time: captions shuffled, thinned out, dropped. Names and meanings are kohya's."""

from dataclasses import dataclass

import numpy as np

from ldm.errors import UsageError


@dataclass(frozen=True)
class CaptionOptions:
    """How captions vary. A tag is what stands between two separators; rates are probabilities.

    shuffle_caption: tags in random order, the first keep_tokens of them excepted. caption_dropout_rate: of saying
    nothing, which classifier-free guidance needs. caption_tag_dropout_rate: of leaving out a tag behind the kept ones.
    caption_prefix, caption_suffix: joined to the caption by a space, before it is shuffled: they belong to its first
    and last tag, and only keep_tokens holds the prefix in its place.
    """

    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_dropout_rate: float = 0.0
    caption_tag_dropout_rate: float = 0.0
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_separator: str = ","

    def __post_init__(self) -> None:
        for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a probability, from 0 to 1")
        if self.keep_tokens < 0:
            raise UsageError(f"keep_tokens is {self.keep_tokens}; it must be at least 0")
        if not self.caption_separator:
            raise UsageError("caption_separator is empty; give what stands between two tags, as ','")

    @property
    def by_tags(self) -> bool:
        """Whether tags move or go. If not, a caption is said in one way, or not at all: two texts to encode."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0


def spoken(caption: str, options: CaptionOptions, dice: np.random.Generator) -> str:
    """The caption as it is said this time; "" where it is dropped.

    By the rules of kohya's sd-scripts: of several lines the first counts; tags that move or go are joined by ", ",
    whatever stood between them; else the caption stays as it is. Empty tags are left out (kohya keeps them).
    """
    dropped = dice.random() < options.caption_dropout_rate
    text = " ".join(filter(None, (options.caption_prefix, caption, options.caption_suffix))).split("\n")[0]
    if dropped or not options.by_tags:
        return "" if dropped else text
    tags = [tag for part in text.split(options.caption_separator) if (tag := part.strip())]
    kept, loose = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if options.shuffle_caption:
        loose = [loose[i] for i in dice.permutation(len(loose))]
    staying = dice.random(len(loose)) >= options.caption_tag_dropout_rate
    return ", ".join(kept + [tag for tag, stays in zip(loose, staying, strict=True) if stays])
