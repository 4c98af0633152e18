"""Captions by kohya's rules, worked out by hand, and the frequencies of what is random."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from ldm.data.captions import CaptionOptions, spoken
from ldm.errors import UsageError


def said(caption: str, options: CaptionOptions, times: int = 1) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(spoken(caption, options, rng) for _ in range(times))


@pytest.mark.parametrize(
    ("caption", "options", "text"),
    [  # nothing moves: the caption stays as it is, its first line alone
        ("a cat ,  sitting", {}, "a cat ,  sitting"),
        ("a cat\nand a dog", {}, "a cat"),
        ("", {}, ""),
        ("a cat", {"caption_prefix": "photo,", "caption_suffix": "by me"}, "photo, a cat by me"),
        ("", {"caption_prefix": "photo"}, "photo"),
        ("a cat", {"caption_dropout_rate": 1.0, "caption_prefix": "photo,"}, ""),  # the prefix goes, too
        # tags are handled: trimmed and joined by ", "
        ("a ,b,, c,", {"shuffle_caption": True, "keep_tokens": 3}, "a, b, c"),
        ("a, b, c", {"shuffle_caption": True, "keep_tokens": 9}, "a, b, c"),
        ("a, b, c", {"caption_tag_dropout_rate": 1.0}, ""),
        ("a, b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, "a"),
        ("b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1, "caption_prefix": "a"}, "a b"),
        ("b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 1, "caption_prefix": "a,"}, "a"),
        ("a; b, c; d", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 2, "caption_separator": ";"}, "a, b, c"),
    ],
)
def test_by_hand(caption, options, text):
    assert said(caption, CaptionOptions(**options), 5) == {text: 5}


def test_every_order_is_as_likely():
    counts = said("w, x, y, z", CaptionOptions(shuffle_caption=True, keep_tokens=1), 3000)
    orders = {f"w, {a}, {b}, {c}" for a, b, c in ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")}
    assert set(counts) == orders
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_tags_are_dropped_one_by_one():
    """Each of four subsets of two tags as often as independent dropping says; the order stays."""
    counts = said("k, x, y", CaptionOptions(caption_tag_dropout_rate=0.25, keep_tokens=1), 4000)
    expected = {"k, x, y": 9, "k, x": 3, "k, y": 3, "k": 1}
    assert set(counts) == set(expected)
    found = [counts[text] for text in expected]
    assert stats.chisquare(found, np.array(list(expected.values())) * 4000 / 16).pvalue > 1e-3


def test_captions_are_dropped_as_often_as_asked():
    counts = said("x", CaptionOptions(caption_dropout_rate=0.1), 5000)
    assert set(counts) == {"x", ""}
    assert stats.binomtest(counts[""], 5000, 0.1).pvalue > 1e-3


def test_dropping_the_caption_changes_no_other_choice():
    """With the same dice: what is said is the same, or nothing."""
    some = CaptionOptions(shuffle_caption=True, caption_tag_dropout_rate=0.3)
    fewer = CaptionOptions(shuffle_caption=True, caption_tag_dropout_rate=0.3, caption_dropout_rate=0.5)
    pairs = [[spoken("a, b, c, d", o, np.random.default_rng(i)) for o in (some, fewer)] for i in range(50)]
    assert all(less in (text, "") for text, less in pairs) and any(less for _, less in pairs)


def test_what_can_be_encoded_beforehand():
    assert not CaptionOptions(keep_tokens=2, caption_dropout_rate=0.5, caption_prefix="a").by_tags
    assert CaptionOptions(shuffle_caption=True).by_tags and CaptionOptions(caption_tag_dropout_rate=0.1).by_tags


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"caption_dropout_rate": 1.5}, "caption_dropout_rate is 1.5"),
        ({"caption_tag_dropout_rate": -0.1}, "caption_tag_dropout_rate is -0.1"),
        ({"caption_dropout_rate": float("nan")}, "caption_dropout_rate is nan"),
        ({"keep_tokens": -1}, "keep_tokens is -1"),
        ({"caption_separator": ""}, "caption_separator is empty"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UsageError, match=words):
        CaptionOptions(**options)
