"""The prompt language against A1111's documented tables, and its encodings against transformers'.

The layouts of windows in LAYOUTS are written by hand; `oracle` puts them through transformers' own classes.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ldm.conditioning import Script, layers_left_out, script, sizes, unheard
from ldm.errors import UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import UNetConfig
from ldm.request import Request
from ldm.text.encoder import Conditioning, JoinedEncoders, TextEncoder, emphasised
from ldm.text.schedules import acts, composed
from ldm.text.tokenizer import CLIPTokenizer
from ldm.text.transformers_text import TransformersText
from ldm.text.weighting import Piece, chunks, weighted

pytestmark = pytest.mark.usefixtures("one_thread")

# -- the syntax -------------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, list[tuple[str, float]]] = {
    # A1111's docstring of parse_prompt_attention
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
    ],
    # read from its rules
    "": [("", 1.0)],
    "[a]": [("a", 1 / 1.1)],
    "((a))": [("a", 1.1 * 1.1)],
    "(a:1.3)": [("a", 1.3)],
    "(a: -.5 )": [("a", -0.5)],
    "(a:+2.)": [("a", 2.0)],
    "[a:1.3]": [("a:1.3", 1 / 1.1)],  # a weight stands in round brackets
    "a:1.3)": [("a:1.3)", 1.0)],
    "a) b]": [("a) b]", 1.0)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)],  # the two kinds need not nest
    "(a:b)": [("a:b", 1.1)],
    "(a:1e2)": [("a:1e2", 1.1)],
    r"\\ \[x\] y\z": [("\\ [x] yz", 1.0)],
    "(a:1.1.1)": [("a:1.1.1", 1.1)],  # A1111 raises
}  # fmt: skip


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights(prompt: str) -> None:
    assert weighted(prompt) == tuple(Piece(*row) for row in WEIGHTS[prompt])


def test_break_opens_a_window_wherever_it_stands() -> None:
    first, second = Piece("a cat"), Piece("a (dog)", begins=True)
    assert weighted(r"a cat BREAK  a \(dog\)") == weighted("a cat\nBREAK\na \\(dog\\)") == (first, second)
    assert weighted("(a BREAK b:1.5)") == (Piece("a", 1.5), Piece("b", 1.5, True))
    assert weighted("BREAK a BREAKBREAK") == (Piece(""), Piece("a BREAKBREAK", begins=True))
    assert weighted("BREAK BREAK") == (Piece(""), Piece("", begins=True), Piece("", begins=True))


ALTERNATE = [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)]
SCHEDULES: dict[str, list[tuple[int, str]]] = {
    # A1111's docstring of get_learned_conditioning_prompt_schedules, for 10 steps
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(5, "a  c"), (10, "a {b|d{ c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": ALTERNATE,
    "[fe|]male": [(step, "female" if step % 2 else "male") for step in range(1, 11)],
    "[fe|||]male": [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)],
    # what its grammar gives with lark, the parser generator that it uses
    "": [(10, "")],
    "[::3]": [(3, ""), (10, "")],
    "[a::3]": [(3, "a"), (10, "")],
    "[:a:3]": [(3, ""), (10, "a")],
    "[a:3:3]": [(3, "a"), (10, "3")],
    "[[a:b:3]:c:5]": [(3, "a"), (5, "b"), (10, "c")],
    "(a [b) [c:d:3]": [(3, "(a [b) c"), (10, "(a [b) d")],
    "(a:b) (c:d:e) [x:y:2]": [(2, "(a:b) (c:d:e) x"), (10, "(a:b) (c:d:e) y")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[(a:b:c):d:3]": [(10, "[(a:b:c):d:3]")],
    "[a:b:3 3]": [(10, "[a:b:3 3]")],
    "[a|[b:c:3]]": [(step, "a" if step % 2 else "b" if step <= 3 else "c") for step in range(1, 11)],
    "[a:b:0]": [(10, "b")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:1e1]": [(10, "a")],
    "[a:b:3.]": [(10, "a")],
    "[a:b:99]": [(10, "a")],
    r"\[a:b:3\] [c\:d:e\]:4]": [(4, r"\[a:b:3\] c\:d"), (10, r"\[a:b:3\] e\]")],
    "x [a:b:3": [(10, "x [a:b:3")],
    "[3] [:] ]": [(10, "[3] [:] ]")],
    # there a | that alternates nothing, or a \ at the end, makes text of the whole prompt; here of itself
    "a | b [c:d:3]": [(3, "a | b c"), (10, "a | b d")],
    "[a:b:3]\\": [(3, "a\\"), (10, "b\\")],
}


@pytest.mark.parametrize("prompt", SCHEDULES)
def test_schedules(prompt: str) -> None:
    assert acts(prompt, 10) == tuple(SCHEDULES[prompt])


def test_the_example_of_a1111s_manual() -> None:
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[: in background:0.25] [shoddy:masterful:0.5]"
    )
    start = "fantasy landscape with a"
    assert acts(prompt, 100) == (
        (25, f"{start} mountain and an oak in foreground shoddy"),
        (50, f"{start} lake and an oak in foreground in background shoddy"),
        (60, f"{start} lake and an oak in foreground in background masterful"),
        (75, f"{start} lake and an oak in background masterful"),
        (100, f"{start} lake and a christmas tree in background masterful"),
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog : -.5\n", [("a cat", 1.2), (" a dog", -0.5)]),
        ("a AND b AND c:2.", [("a", 1.0), (" b", 1.0), (" c", 2.0)]),
        ("BAND AND-sea ANDy", [("BAND", 1.0), ("-sea ANDy", 1.0)]),
        ("a AND", [("a", 1.0), ("", 1.0)]),
        ("(a:1.2)", [("(a:1.2)", 1.0)]),
        ("[a:b:3]", [("[a:b:3]", 1.0)]),
        ("16:9", [("16", 9.0)]),
        ("16:9,", [("16:9,", 1.0)]),
        ("a:b:1e3", [("a:b:1e3", 1.0)]),
    ],
)
def test_parts(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert composed(prompt) == tuple(expected)


@pytest.mark.parametrize(
    ("read", "prompt", "said"),
    [
        (weighted, "(" * 65 + "a", "more than 64 deep"),
        (weighted, "[(" * 33 + "a" + ")]" * 33, "more than 64 deep"),
        (weighted, "((a:500):3)", "1500"),
        (weighted, f"(a:{'9' * 400})", "inf"),
        (weighted, f"((a:{'9' * 400}):0)", "nan"),
        (composed, f"a:{'9' * 400}", "inf"),
        (composed, "a:-1001", "-1001"),
        (composed, " AND ".join("a" * 65), "65 parts"),
    ],
)
def test_what_no_prompt_means_is_refused(read: Callable[[str], object], prompt: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(prompt)


N = 100_000
HOSTILE = {
    **{
        f"{text!r}": text * (N // len(text))
        for text in ("(", "[", ")", "]", ":", "|", "\\", " ", "(a", "[a:", "[a|", "1")
    },
    "nested groups": "[" * (N // 2) + "]" * (N // 2),
    "nested changes": "[" * (N // 6) + "a" + ":b:3]" * (N // 6),
    "nested turns": "[" * (N // 4) + "a" + "|b]" * (N // 4),
    "mismatched": "[(" * (N // 4) + "])" * (N // 4),
    "one wrong inside": "[" * (N // 6) + "a:b" + ":b:3]" * (N // 6),
    "wide": "[a:b:3]" * (N // 7),
    "turns": "[a|b]" * (N // 5),
    "weights": "(a:1.1)" * (N // 7),
    "open, then many": "(" * 64 + "a)b(c:2)" * (N // 8),
    "blank BREAK": " " * N + "BREAK",
    "colon and blanks": ":" + " " * N + "1 x",
    "colon and digits": "(a:" + "1" * N + "x",
    "digits of a step": "[a:" + "1" * N + "x]",
    "ANDs": "AND " * (N // 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts_neither_recurse_nor_take_long(name: str) -> None:
    prompt, begun = HOSTILE[name], time.process_time()
    for read in (weighted, composed, lambda text: acts(text, 10)):
        try:
            read(prompt)
        except UsageError as error:
            assert len(str(error)) < 200
    assert time.process_time() - begun < 3  # quadratic ones take minutes


# -- windows ----------------------------------------------------------------------------------------------------------

Layout = list[list[tuple[str, float]]]
CAT, DOG = "cat ", "dog "
LAYOUTS: dict[str, Layout] = {  # prompt -> the texts of each window, with their weights
    "": [[]],
    "a photo of a cat, sitting": [[("a photo of a cat, sitting", 1)]],
    "a (red:1.4) cat, [sitting]\\)": [[("a", 1), ("red", 1.4), ("cat,", 1), ("sitting", 1 / 1.1), (")", 1)]],
    "(under)(water) [land]ing": [[("underwater", 1.1), ("land", 1 / 1.1), ("ing", 1)]],  # equal weights are one text
    CAT * 75: [[(CAT * 75, 1)]],
    CAT * 80: [[(CAT * 75, 1)], [(CAT * 5, 1)]],
    CAT * 55 + ", " + DOG * 30: [[(CAT * 55 + ",", 1)], [(DOG * 30, 1)]],  # the comma is 20 from the end
    CAT * 54 + ", " + DOG * 30: [[(CAT * 54 + "," + DOG * 20, 1)], [(DOG * 10, 1)]],  # 21
    CAT * 65 + ", " + DOG * 90: [[(CAT * 65 + ",", 1)], [(DOG * 75, 1)], [(DOG * 15, 1)]],
    CAT * 74 + ", dog": [[(CAT * 74 + ",", 1)], [("dog", 1)]],
    CAT * 75 + ", dog": [[(CAT * 75, 1)], [(", dog", 1)]],
    f"({CAT * 60}, {DOG * 30}:1.2) end": [[(CAT * 60 + ",", 1.2)], [(DOG * 30, 1.2), ("end", 1)]],
    "cat BREAK (dog:0.7) BREAK": [[("cat", 1)], [("dog", 0.7)]],
    "BREAK cat": [[], [("cat", 1)]],
    f"{CAT * 100} BREAK dog": [[(CAT * 75, 1)], [(CAT * 25, 1)], [("dog", 1)]],
}


def text_model(width: int, act: str, projection: int = 0) -> CLIPTextModel:
    torch.manual_seed(width)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2, hidden_act=act,
        projection_dim=projection, eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    for parameter in model.text_model.parameters():
        torch.nn.init.normal_(parameter, 0.02 if parameter.ndim > 1 else 0.3, 0.2)
    return model


ENCODERS = {  # family -> width, activation, projection, padding, penultimate
    "sd1": (32, "quick_gelu", 0, "<|endoftext|>", False),
    "sd2": (48, "gelu", 0, "!", False),
    "sdxl": (40, "gelu", 24, "!", True),
}


@pytest.fixture(scope="module")
def encoders() -> dict[str, TextEncoder]:
    """Text encoders of the true tokenizer and window, and narrow."""
    return {
        name: TextEncoder(CLIPTokenizer.standard(pad), text_model(width, act, projection), penultimate)
        for name, (width, act, projection, pad, penultimate) in ENCODERS.items()
    }


@pytest.fixture(scope="module")
def theirs(encoders: dict[str, TextEncoder], tmp_path_factory) -> dict[str, tuple[Any, Any]]:
    """transformers' text models and tokenizers of the same weights."""
    found = {}
    for name, encoder in encoders.items():
        folder: Path = tmp_path_factory.mktemp(name)
        encoder.tokenizer.save(folder / "words")
        (folder / "config.json").write_text(json.dumps(encoder.model.config.to_dict()))
        save_file(encoder.model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        projected = encoder.model.config.projection_dim
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        words = transformers.CLIPTokenizer.from_pretrained(folder / "words")
        found[name] = kind.from_pretrained(folder).eval(), words
    return found


@torch.no_grad()
def oracle(them: tuple[Any, Any], layout: Layout, hidden: int, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States and the first window's pooled vector, with transformers' classes. hidden: which of hidden_states."""
    model, words = them
    states, pooled = [], []
    for window in layout:
        ids, weights = [words.bos_token_id], [1.0]
        for text, weight in window:
            own = words(text, add_special_tokens=False).input_ids
            ids, weights = ids + own, weights + [weight] * len(own)
        ids += [words.eos_token_id]
        ids += [words.pad_token_id] * (77 - len(ids))
        weights += [1.0] * (77 - len(weights))
        assert len(ids) == 77
        out = model(torch.tensor([ids]), output_hidden_states=True)
        z = out.hidden_states[hidden]
        z = getattr(model, "text_model", model).final_layer_norm(z) if norm else z
        heavy = z * torch.tensor(weights)[None, :, None]
        states.append(heavy * z.mean() / heavy.mean())
        pooled.append(out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output)
    return torch.cat(states, 1), pooled[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("prompt", LAYOUTS, ids=range(len(LAYOUTS)))
def test_encodings_equal_those_of_transformers(encoders, theirs, prompt: str) -> None:
    for name, encoder in encoders.items():
        last = -2 if encoder.penultimate else -1
        for skip in (0, 1):
            found = encoder.read(weighted(prompt), skip)
            states, pooled = oracle(theirs[name], LAYOUTS[prompt], last - skip, norm=not encoder.penultimate)
            assert close(found.context, states) and close(found.pooled, pooled), (name, skip)
    pair = JoinedEncoders((replace(encoders["sd1"], penultimate=True), encoders["sdxl"]))
    both = pair.read(weighted(prompt))
    one, _ = oracle(theirs["sd1"], LAYOUTS[prompt], -2, norm=False)
    two, pooled = oracle(theirs["sdxl"], LAYOUTS[prompt], -2, norm=False)
    assert close(both.context, torch.cat([one, two], -1)) and close(both.pooled, pooled)


def test_joined_encoders_of_other_words_come_out_even(encoders) -> None:
    first, second = (encoders[name] for name in ("sd1", "sd2"))
    spelling = replace(second, tokenizer=CLIPTokenizer.train(["x"], 514))  # letter by letter
    found = JoinedEncoders((first, spelling)).read(weighted(CAT * 30), 1)
    assert found.context.shape == (1, 154, 80) and spelling.read(weighted(CAT * 30)).context.shape == (1, 154, 48)
    assert torch.equal(found.context[0, 77:, :32], first([""], 1).context[0])


def test_plain_prompts_are_read_in_one_call_with_the_same_bits(encoders) -> None:
    calls = []
    for encoder in encoders.values():
        handle = encoder.model.register_forward_hook(lambda *_: calls.append(1))
        for prompt in ("", "a photo of a cat, sitting", CAT * 75, "x<|endoftext|>y 🦉 naïve"):
            plain = encoder([prompt])
            calls.clear()
            found = encoder.read(weighted(prompt))
            assert len(calls) == 1
            assert torch.equal(found.context, plain.context) and torch.equal(found.pooled, plain.pooled)
        handle.remove()


def test_the_model_in_the_box_reads_plain_prompts_with_the_same_bits() -> None:
    folder = Path(__file__).parents[1] / "weights"
    model = CLIPTextModel(CLIPTextConfig.from_dict(json.loads((folder / "text_encoder/config.json").read_text())))
    model.load_state_dict({key: x.float() for key, x in load_file(folder / "text_encoder/model.safetensors").items()})
    encoder = TextEncoder(CLIPTokenizer.from_folder(folder / "tokenizer"), model.eval())
    for prompt in ("", "a taco on a red background", "an owl, left of a pizza!", "owl " * 30):
        assert torch.equal(encoder.read(weighted(prompt)).context, encoder([prompt]).context)
    assert encoder.read(weighted("owl " * 31)).context.shape == (1, 64, 192)


def test_emphasis_keeps_the_mean_in_every_type() -> None:
    states = torch.randn(1, 7, 5) + 1
    weights = [1.0, 1.5, 1.5, 0.2, 1.0, 1.0, 1.0]
    found = emphasised(states, weights)
    assert abs(found.mean() - states.mean()) <= 1e-6
    level = states - states.mean(-1, keepdim=True)  # there is no mean to keep
    assert close(emphasised(level, weights), level * torch.tensor(weights)[:, None])
    assert torch.equal(emphasised(torch.zeros(1, 7, 5), weights), torch.zeros(1, 7, 5))
    torn = torch.ones(1, 7, 5)
    torn[:, 3] = -5.5  # a mean of 1 / 14 of one sign becomes one of 0.77
    assert torch.equal(emphasised(torn, weights), torn * torch.tensor(weights)[:, None])
    assert close(found / found[:, :1] * states[:, :1], states * torch.tensor(weights)[None, :, None])
    assert emphasised(states, [1.0] * 7) is states
    half = emphasised(states.half(), weights)
    assert half.dtype == torch.float16 and (half - found).abs().max() <= 5e-3


def test_learned_words_are_never_divided(sd1) -> None:
    plain = sd1.tokenizer
    tokenizer = CLIPTokenizer(plain.vocab, plain.merges, added={"<x>": 49408, "<x>_1": 49409, "<x>_2": 49410})
    comma = tokenizer.comma_id

    def ids(text: str) -> list[tuple[int, ...]]:
        return [word.ids for word in tokenizer.words(text)]

    (cat,), (word,) = ids("cat")[0], ids("<x>")
    assert word == (49408, 49409, 49410) and [(comma,)] == ids(",")

    def windows(prompt: str) -> list[list[int]]:
        return [[index for index, _ in chunk] for chunk in chunks(weighted(prompt), ids, 75, comma)]

    assert windows(CAT * 72 + "<x>") == [[cat] * 72 + [*word]]
    assert windows(CAT * 73 + "<x> cat") == [[cat] * 73, [*word, cat]]
    assert windows(CAT * 75 + "<x>") == [[cat] * 75, [*word]]
    assert windows(CAT * 60 + ", " + CAT * 10 + "<x> " + CAT * 3) == [
        [cat] * 60 + [comma],
        [cat] * 10 + [*word] + [cat] * 3,
    ]
    # a full window is what draws the cut to the comma, as in A1111: this one has a place left when the word comes
    assert windows(CAT * 60 + ", " + CAT * 13 + "<x>") == [[cat] * 60 + [comma] + [cat] * 13, [*word]]
    heavy = chunks(weighted(CAT * 74 + "(<x>:1.5)"), ids, 75, comma)
    assert heavy[1] == [(index, 1.5) for index in word]


# -- the script -------------------------------------------------------------------------------------------------------

STEPS = 10


def model_of(encoder: TextEncoder | JoinedEncoders, zeros: bool = False) -> Any:
    """The parts of a model that a script asks after."""
    parts = encoder.parts if isinstance(encoder, JoinedEncoders) else (encoder,)
    xl = parts[-1].penultimate
    config = replace(
        UNetConfig(),
        cross_attention_dim=sum(part.model.config.hidden_size for part in parts),
        projection_class_embeddings_input_dim=24 if xl else 0,
    )
    weight = torch.zeros(1)
    return SimpleNamespace(
        unet=SimpleNamespace(config=config, conv_in=SimpleNamespace(weight=weight)),
        flags={"force_zeros_for_empty_prompt": zeros},
    )


def told(
    encoder: TextEncoder | JoinedEncoders,
    prompt: str | tuple[str, ...] = (),
    negative: str | tuple[str, ...] = "",
    guiding: bool = True,
    given: Conditioning | None = None,
    other: Conditioning | None = None,
    zeros: bool = False,
    **fields: Any,
) -> Script:
    order = Request(prompt=prompt, negative_prompt=negative, num_inference_steps=STEPS, **fields)
    return script(model_of(encoder, zeros), encoder, order, guiding, given, other)


@pytest.fixture(scope="module")
def sd1(encoders) -> TextEncoder:
    return encoders["sd1"]


@pytest.fixture(scope="module")
def xl(encoders) -> JoinedEncoders:
    return JoinedEncoders((replace(encoders["sd1"], penultimate=True), encoders["sdxl"]))


def test_a_plain_script_is_the_encoding(sd1, xl) -> None:
    for encoder in (sd1, xl):
        for guiding in (False, True):
            found = told(encoder, ("a cat", "a dog"), "bad", guiding, num_images_per_prompt=2)
            texts = (["bad"] * 4 if guiding else []) + ["a cat", "a cat", "a dog", "a dog"]
            expected = encoder(texts)
            ((until, said),) = found.acts
            assert until == STEPS and torch.equal(said.context, expected.context)
            assert said.pooled is None if encoder is sd1 else torch.equal(said.pooled, expected.pooled)
            assert found.weights == ((1.0,) * 4,) and found.tokens == (77,) * len(texts)
            assert found.guiding is guiding


def test_acts_of_all_prompts_are_joined_and_each_text_is_read_once(sd1) -> None:
    calls = []
    handle = sd1.model.register_forward_hook(lambda *_: calls.append(1))
    found = told(sd1, ("a [cat:dog:3]", "a cat", "a [cat|dog]"), "[:bad:0.5]")
    handle.remove()
    assert len(calls) == 4  # "a cat", "a dog", "", "bad"
    assert [until for until, _ in found.acts] == list(range(1, 11))
    ends = dict(found.acts)
    for until, (first, third, aside) in {
        1: ("a cat", "a cat", ""), 2: ("a cat", "a dog", ""), 4: ("a dog", "a dog", ""), 5: ("a dog", "a cat", ""),
        7: ("a dog", "a cat", "bad"), 10: ("a dog", "a dog", "bad"),
    }.items():  # fmt: skip
        expected = sd1([aside, aside, aside, first, "a cat", third])
        assert torch.equal(ends[until].context, expected.context), until
    assert ends[1] is ends[3] and ends[7] is ends[9] and ends[2] is not ends[4]
    assert len(told(sd1, "[a cat:a cat:3]").acts) == 1  # the same words: one act


def test_acts_in_the_profile_of_a1111_end_a_step_later(sd1) -> None:
    """Its sampler says in the step with index i, from 0, the first act whose end is not below i."""
    prompt = "[a|b|[c:d:4]] cat"
    table = acts(prompt, STEPS)
    for profile, at in ((None, lambda i, end: i < end), ("a1111", lambda i, end: i <= end)):
        found = told(sd1, prompt, profile=profile)
        for i in range(STEPS):
            expected = sd1([next(text for end, text in table if at(i, end))])
            said = next(said for until, said in found.acts if i < until)
            assert torch.equal(said.context[1:], expected.context), (profile, i)
        assert found.acts[-1][0] == STEPS


def test_parts_are_blocks_with_weights(sd1) -> None:
    found = told(sd1, ("a cat :1.5 AND a dog AND a cow :-0.5", "a hen"), ("bad", "worse"))
    ((_, said),) = found.acts
    expected = sd1(["bad", "worse", "a cat", "a hen", " a dog", "a hen", " a cow", "a hen"])
    assert torch.equal(said.context, expected.context)
    assert found.weights == ((1.5, 1.0), (1.0, 0.0), (-0.5, 0.0)) and found.tokens == (77,) * 8
    alone = told(sd1, "a cat AND a dog", "bad", guiding=False)  # which needs what it is a direction from
    assert alone.guiding and len(alone.acts[0][1]) == 3
    assert told(sd1, "a cat :0.5", guiding=False).guiding and not told(sd1, "a cat :1", guiding=False).guiding


def test_shorter_texts_are_filled_up_with_empty_windows(sd1, xl) -> None:
    for encoder in (sd1, xl):
        long, short, empty = (encoder.read(weighted(text)).context for text in (CAT * 80, "a dog", ""))
        filled = torch.cat([short, empty], 1)
        ((_, said),) = told(encoder, CAT * 80, "a dog").acts
        assert torch.equal(said.context, torch.cat([filled, long]))
        ((_, said),) = told(encoder, "a dog", CAT * 80).acts
        assert torch.equal(said.context, torch.cat([long, filled]))
    found = told(sd1, (CAT * 80, "a dog", "[a hen:a cow BREAK a cow:5]"), "bad")
    assert found.tokens == (154, 77, 154) * 2 and found.acts[0][1].context.shape == (6, 154, 32)
    apart = told(sd1, (CAT * 80, "a dog"), "bad", profile="a1111")
    assert apart.tokens == (77, 77, 154, 77) and apart.acts[0][1].context.shape == (4, 154, 32)


def test_a_prompt_is_told_the_same_beside_longer_ones(sd1) -> None:
    for prompt, negative in (("a dog", "bad"), ("a [dog:cow:2]", CAT * 80), ("a dog AND a cow", "bad")):
        alone = told(sd1, prompt, negative)
        beside = told(sd1, (prompt, CAT * 160, "a [cow|hen] AND a hen"), (negative, "", ""))
        for i in range(STEPS):
            own = next(said.context for until, said in alone.acts if i < until)
            rows = next(said.context for until, said in beside.acts if i < until)[::3]
            assert alone.tokens == beside.tokens[::3][: len(own)]
            assert torch.equal(rows[: len(own), : alone.tokens[0]], own)


def test_empty_negative_prompts_of_sdxl_are_zeros(xl) -> None:
    found = told(xl, ("a cat", CAT * 80), ("", "bad"), zeros=True)
    ((_, said),) = found.acts
    assert not said.context[0].any() and not said.pooled[0].any() and found.tokens == (77, 154, 77, 154)
    assert torch.equal(said.context[1, :77], xl(["bad"]).context[0]) and said.pooled[1].any()
    assert told(xl, "a cat", "", zeros=True, profile="a1111").tokens == (77, 77)
    assert told(xl, "a cat", "", zeros=False).acts[0][1].context[0].any()


def test_embeddings_in_place_of_prompts(sd1, xl) -> None:
    ready, aside = sd1(["a cat", "a dog"]), sd1(["bad", "worse"])
    found = told(sd1, given=ready, other=aside, num_images_per_prompt=2)
    ((until, said),) = found.acts
    assert until == STEPS and torch.equal(said.context, Conditioning.cat([aside.repeat(2), ready.repeat(2)]).context)
    ((_, said),) = told(sd1, negative=CAT * 80, given=ready).acts  # text is filled up to embeddings and they to it
    assert torch.equal(said.context[2:, :77], ready.context) and said.context.shape == (4, 154, 32)
    cut = Conditioning(aside.context[:, :9])
    for given, other, shape in (
        (ready, cut, r"\[2, 9, 32\]"),
        (ready, aside.select([0]), r"\[1, 77, 32\]"),
        (ready, sd1.read(weighted(CAT * 80)).repeat(2), r"\[2, 154, 32\]"),
    ):
        with pytest.raises(UsageError, match=shape):
            told(sd1, given=given, other=other)
    for prompts, other in ((("a", "b"), aside.select([0])), (("a", "b"), cut)):
        with pytest.raises(UsageError, match="shape"):
            told(sd1, prompts, other=other)
    with pytest.raises(UsageError, match=r"takes \[prompts, tokens, 32\]"):
        told(sd1, given=Conditioning(torch.zeros(1, 77, 31)))
    with pytest.raises(UsageError, match="2 negative prompts for 3 prompts"):
        told(sd1, given=sd1(["a", "b", "c"]), negative=("a", "b"))
    with pytest.raises(UsageError, match="pooled"):
        told(xl, given=Conditioning(torch.zeros(1, 77, 72)))


def test_literal_prompts_have_no_syntax_and_one_window(sd1) -> None:
    prompt = "a (red:1.4) [cat:dog:3] AND a \\( :0.5"
    for how in ({"literal": True}, {"profile": "diffusers"}):
        found = told(sd1, prompt, "(bad:2)", **how)
        ((_, said),) = found.acts
        assert torch.equal(said.context, sd1(["(bad:2)", prompt]).context)
        order = Request(prompt, negative_prompt="(bad:2)", num_inference_steps=STEPS, **how)
        assert unheard(sd1, order) == ()
        order = replace(order, prompt=CAT * 75 + "and dogs", negative_prompt=CAT * 76)
        long = told(sd1, order.prompt, order.negative_prompt, **how)
        assert torch.equal(long.acts[0][1].context, sd1([CAT * 75, CAT * 75]).context)
        assert unheard(sd1, order) == tuple(
            f"the prompt is longer than the encoder's 75 tokens; not read: {lost!r}" for lost in ("cat", "and dogs")
        )


def test_what_is_read_otherwise_than_it_may_seem_is_said(sd1, encoders) -> None:
    order = Request(prompt=("a wall, 16:9", CAT * 100), num_inference_steps=STEPS)
    (note,) = unheard(sd1, order)
    assert "'a wall, 16:9'" in note and "weight, 9" in note and "comma" in note
    assert unheard(sd1, replace(order, prompt="a wall, 16:9,")) == ()
    skipped = replace(order, prompt="a cat", clip_skip=2, profile="a1111")
    assert unheard(sd1, skipped) == () and "clip_skip 2 was not heeded" in unheard(encoders["sd2"], skipped)[0]


def test_clip_skip_counts_as_in_a1111(encoders, sd1, xl) -> None:
    for clip_skip, skip in ((None, 0), (1, 0), (2, 1), (3, 2)):
        for encoder in (sd1, encoders["sd2"], *([xl] if skip < 2 else [])):
            ((_, said),) = told(encoder, "a cat", "bad", clip_skip=clip_skip).acts
            assert torch.equal(said.context, encoder(["bad", "a cat"], skip).context)
    ((_, said),) = told(sd1, "a cat", CAT * 80, clip_skip=2).acts  # so do the windows that fill up
    assert torch.equal(said.context[1], sd1(["a cat", ""], 1).context.flatten(0, 1))
    for skip in (0, 1, 2):
        ((_, said),) = told(sd1, "a cat", "bad", clip_skip=skip, profile="diffusers").acts
        assert torch.equal(said.context, torch.cat([sd1(["bad"]).context, sd1(["a cat"], skip).context]))
    for encoder, heeded in ((sd1, 1), (encoders["sd2"], 0), (xl, 0), (encoders["sdxl"], 0)):
        assert layers_left_out(encoder, 2, "a1111")[:2] == (heeded, heeded)
    for encoder, clip_skip, profile, said in (
        (sd1, 0, None, "from 1, the last layer"), (sd1, 0, "a1111", "diffusers"), (sd1, 4, None, "takes 1 to 3"),
        (sd1, 3, "diffusers", "takes 0 to 2"), (xl, 3, None, "takes 1 to 2"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            layers_left_out(encoder, clip_skip, profile)


def test_sizes_follow_the_rows(xl) -> None:
    order = Request(prompt="a", height=64, width=32, crop_top=3)
    row = [64, 32, 3, 0, 64, 32]
    for guiding, parts in ((False, 1), (True, 1), (True, 3)):
        found = sizes(model_of(xl), order, 2, guiding, parts)
        assert found is not None and found.tolist() == [row] * 2 * (guiding + parts)
    model = model_of(xl)
    model.flags["requires_aesthetics_score"] = True
    found = sizes(model, order, 1, True, 2)
    assert found is not None and found[:, 4].tolist() == [2.5, 6, 6]


# -- encoders of one window -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> TransformersText:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "on", "the", "red", "moon", "##s"]
    vocab = {word: i for i, word in enumerate(words)}
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertTokenizer(vocab=vocab, model_max_length=9).save_pretrained(folder / "t")
    model = transformers.BertModel(config).eval()
    torch.nn.init.constant_(model.encoder.layer[-1].output.LayerNorm.bias, 0.5)
    model.save_pretrained(folder / "m")
    return TransformersText.from_folder(folder / "m", folder / "t")


def test_weights_of_an_encoder_of_one_window(bert) -> None:
    plain = bert(["a cats on the red moon"]).context
    found = bert.read(weighted("a (cat)s [on] the BREAK (red:1.5) moon")).context
    weights = torch.tensor([1, 1, 1.1, 1, 1 / 1.1, 1, 1.5, 1, 1])
    heavy = plain * weights[None, :, None]
    assert close(found, heavy * plain.mean() / heavy.mean())
    assert torch.equal(bert.read(weighted("a cats on the red moon")).context, plain)
    order = Request(prompt="a cat on the (red:2) moon a cat moon", num_inference_steps=4)
    assert unheard(bert, order) == ("the prompt is longer than the encoder's 7 tokens; not read: 'cat moon'",)
    with pytest.raises(UsageError, match="takes 1 to 1"):
        unheard(bert, replace(order, clip_skip=2))
    assert unheard(bert, replace(order, prompt="a cat", clip_skip=1)) == ()
