"""What a scene shows, and how it is said: the captions of the corpus, canonical and natural."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RELATIONS = ("to the left of", "to the right of", "above", "below")
AND = "and"  # two objects, the first one on the left; no RELATION, for it is not said where they stand
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIZES = ("small", "large")
# Phrasings of every caption, the canonical one first. {x} is the subject, {c} the background colour, {a} its article.
PHRASINGS = (
    "{x} on {a} {c} background",
    "{x} in front of {a} {c} background",
    "{a} {c} background with {x}",
    "{x}, {c} background",
    "a picture of {x} on {c}",
    "{x} against {a} {c} background",
    "{c} background, {x}",
    "an emoji of {x} on {a} {c} background",
    "draw {x} on {c}",
    "{x}",  # any background
)
OTHER_WORDS: dict[str, tuple[str, ...]] = {
    "to the left of": ("left of", "on the left of"),
    "to the right of": ("right of", "on the right of"),
    "above": ("over", "on top of"),
    "below": ("under", "beneath"),
    "and": ("next to", "beside", "with"),
    "one": ("1", "a single"),
    "two": ("2", "a pair of"),
    "three": ("3",),
    "four": ("4",),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
}
IN_STYLE: dict[str, tuple[str, ...]] = {
    "outline": ("the outline of {x}", "an outline of {x}", "{x} in outline"),
    "silhouette": ("the silhouette of {x}", "a silhouette of {x}"),
    "pixelated": ("a pixelated {n}", "a pixel art {n}"),
    "tinted": ("{x} tinted {c}", "{x} in {c} tones"),
}
CANONICAL_SHARE = 0.5  # of training captions
WORD_SHARE = 0.7  # of the words of a natural caption that are the canonical ones, where there are others


@dataclass(frozen=True)
class SceneSpec:
    """What a scene shows, without where exactly: enough to write its caption and to judge a picture of it.

    An object is the name of an emoji, or a colour and a shape ("red circle").
    """

    objects: tuple[str, ...]  # one; two with a relation; three, of which the first is above or below the others
    background: str
    relation: str = ""  # of the first object to the others: one of RELATIONS, or AND
    count: int = 0  # how many of a single object; 0: one, and the caption does not say so
    size: str = ""  # of SIZES or "", of a single object
    style: str = ""  # of STYLES or "", of a single object

    def caption(self, phrasing: int = 0) -> str:
        """The canonical words for this scene; phrasing 0 is the canonical frame, too."""
        return _framed(_subject(self, Speaker()), self.background, phrasing)

    def said(self, dice: random.Random, synonyms: Mapping[str, Sequence[str]]) -> str:
        """The words of a training caption: canonical, or one of many natural ones."""
        if dice.random() < CANONICAL_SHARE:
            return self.caption()
        subject = _subject(self, Speaker(dice, synonyms))
        return _framed(subject, self.background, dice.randrange(len(PHRASINGS)))


@dataclass(frozen=True)
class Speaker:
    """Who chooses among words that mean the same; without dice the canonical ones."""

    dice: random.Random | None = None
    synonyms: Mapping[str, Sequence[str]] | None = None

    def word(self, canonical: str) -> str:
        """A word, or another for it."""
        others = {**OTHER_WORDS, **(self.synonyms or {})}.get(canonical, ())
        if self.dice is None or not others or self.dice.random() < WORD_SHARE:
            return canonical
        return self.dice.choice(others)

    def one_of(self, phrases: Sequence[str]) -> str:
        """One of some phrases, the canonical one first."""
        return phrases[0] if self.dice is None else self.dice.choice(phrases)


def _subject(spec: SceneSpec, speaker: Speaker) -> str:
    nouns = [speaker.word(name) for name in spec.objects]
    if spec.relation:
        first, *others = (with_article(noun) for noun in nouns)
        return f"{first} {speaker.word(spec.relation)} {' and '.join(others)}"
    noun = nouns[0]
    if spec.count:
        number = speaker.word(COUNTS[spec.count])
        return f"{number} {noun if spec.count == 1 else plural(noun)}"
    if spec.style:
        kind, _, colour = spec.style.partition(" ")
        return speaker.one_of(IN_STYLE[kind]).format(x=with_article(noun), n=noun, c=colour)
    return with_article(f"{speaker.word(spec.size)} {noun}".strip())


def _framed(subject: str, background: str, phrasing: int) -> str:
    article = with_article(background).split()[0]
    return PHRASINGS[phrasing].format(x=subject, c=background, a=article)


def with_article(noun: str) -> str:
    """'an owl', 'a taco', 'a unicorn', 'an hourglass'."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "uku", "eu", "ewe", "one"))
    vowel = vowel or noun.startswith(("hour", "x-"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a CLDR short name: bananas, peaches, cherries, mice, rolls of paper."""
    irregular = {"mouse": "mice", "goose": "geese", "ox": "oxen", "fish": "fish", "sheep": "sheep", "deer": "deer",
                 "knife": "knives", "leaf": "leaves", "loaf": "loaves", "tooth": "teeth", "wolf": "wolves",
                 "bison": "bison", "squid": "squid", "tomato": "tomatoes", "potato": "potatoes",
                 "child": "children", "man": "men", "woman": "women", "person": "people", "merperson": "merpeople",
                 "foot": "feet", "elf": "elves", "superhero": "superheroes"}  # fmt: skip
    noun, of, rest = noun.partition(" of ")
    head, _, last = noun.rpartition(" ")
    if last in irregular:
        last = irregular[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip() + of + rest
