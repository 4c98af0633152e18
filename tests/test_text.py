"""Tokenizer and text encoder against transformers, in the same process and through files both ways."""

import json
import random
import subprocess
import sys

import pytest
import torch
import transformers

from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.text.encoder import Conditioning, TextEncoder
from ldm.text.tokenizer import CLIPTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["a", "the", "owl", "taco", "pizza", "banana", "red", "blue", "left", "right", "above", "of", "on", "three"]
HOSTILE = [
    "",
    " ",
    "\t\n\r\x0b\x0c",
    "a  taco\u00a0on\u3000a\nRED background!!",
    "don't they'll we've I'm he'd it's y'all're",
    "x<|endoftext|>y <|startoftext|> <|ENDOFTEXT|> </w> ab</w>",
    "naïve nai\u0308ve \uff46\uff55\uff4c\uff4c ﬁ Ⅷ ½ 12345 ٣٤٥",
    "🦉🍕 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🏳️‍🌈",
    "日本語のテキスト 한국어 العربية ไทย हिन्दी",
    "\x00\x01\x7f\x85\u200b\u200d\ufeff\ufffd\U0010ffff",
    "İstanbul ẞ ς Σ ǅ",
    "...---___***((([[[{{{<<<>>>}}}]]])))!?;:'\"`~@#$%^&|\\/+=",
    "a" * 500,
    "owl " * 200,
    "!" * 100,
]


def captions(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


def fuzz(count: int, seed: int) -> list[str]:
    """Strings of all of Unicode but surrogates, mostly of the parts where something happens."""
    rng = random.Random(seed)
    ranges = [(32, 126), (0, 0x17F), (0x300, 0x36F), (0x2000, 0x206F), (0x1F300, 0x1FAFF), (0, 0xD7FF)]

    def letter() -> str:
        return chr(rng.randint(*rng.choice(ranges)))

    def word() -> str:
        return rng.choice(WORDS) if rng.random() < 0.4 else "".join(letter() for _ in range(rng.randint(1, 6)))

    return [rng.choice(["", " "]).join(word() for _ in range(rng.randint(0, 25))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.train(captions(400, seed=0), vocab_size=548, max_length=20)


def theirs(folder, prompts: list[str]) -> list[list[int]]:
    oracle = transformers.CLIPTokenizer.from_pretrained(folder)
    return oracle(prompts, padding="max_length", truncation=True, max_length=oracle.model_max_length).input_ids


def test_a_trained_tokenizer_joins_the_words_it_was_trained_on(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer) == 548 and sorted(tokenizer.vocab.values()) == list(range(548))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (546, 547, 547)
    ids = tokenizer(["a red owl"]).ids[0].tolist()
    assert ids == [546, *(tokenizer.vocab[word + "</w>"] for word in ("a", "red", "owl")), *[547] * 16]
    with pytest.raises(UsageError, match="514"):
        CLIPTokenizer.train(["x"], vocab_size=513)
    assert len(CLIPTokenizer.train(["owl owl", "x"], vocab_size=5000)) == 514 + 2  # "ow", "owl</w>": no more pairs


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(300)]
    many_ties = [" ".join(rng.choices(words, k=6)) for _ in range(500)]
    code = (
        "import sys, json; from ldm.text.tokenizer import CLIPTokenizer as T\n"
        "t = T.train(json.load(sys.stdin), 900); print(json.dumps([list(t.vocab), t.merges]))"
    )
    here = CLIPTokenizer.train(many_ties, 900)
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(many_ties), capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == [list(here.vocab), [list(pair) for pair in here.merges]]


@pytest.mark.parametrize("kept", ["both", "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_ids_equal_those_of_transformers(tokenizer: CLIPTokenizer, tmp_path, kept: str, pad: str) -> None:
    CLIPTokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.max_length, pad).save(tmp_path)
    for name in {"both": [], "tokenizer.json": ["vocab.json", "merges.txt"], "vocab.json": ["tokenizer.json"]}[kept]:
        (tmp_path / name).unlink()
    mine = CLIPTokenizer.from_folder(tmp_path)
    prompts = HOSTILE + fuzz(300, seed=1) + captions(30, seed=2)
    assert mine.pad == pad and mine.max_length == 20
    assert mine(prompts).ids.tolist() == theirs(tmp_path, prompts)


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ids_of_many_strings_equal_those_of_transformers(tmp_path, count: int) -> None:
    mine, prompts = CLIPTokenizer.standard(), fuzz(count, seed=4)
    mine.save(tmp_path)
    oracle = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = oracle(prompts, add_special_tokens=False).input_ids
    assert [[index for word in mine.words(prompt) for index in word.ids] for prompt in prompts] == expected
    assert max(map(len, expected)) > 77  # of any length


def test_folders_written_by_transformers_are_read(tokenizer: CLIPTokenizer, tmp_path) -> None:
    oracle = transformers.CLIPTokenizer(
        vocab=tokenizer.vocab, merges=tokenizer.merges, model_max_length=12, pad_token="!"
    )
    oracle.add_tokens(["<my-cat>", "<my-dog>"])  # as textual inversion does
    oracle.save_pretrained(tmp_path)
    mine = CLIPTokenizer.from_folder(tmp_path)
    prompts = ["a <my-dog> left of a<my-cat>!", *HOSTILE, *fuzz(100, seed=3)]
    assert mine(prompts).ids.tolist() == theirs(tmp_path, prompts) and 549 in mine(prompts[:1]).ids
    mine.save(tmp_path / "again")
    assert theirs(tmp_path / "again", prompts) == theirs(tmp_path, prompts)
    (tmp_path / "again" / "tokenizer.json").unlink()
    assert torch.equal(CLIPTokenizer.from_folder(tmp_path / "again")(prompts).ids, mine(prompts).ids)


def test_special_tokens_are_found_where_old_repositories_keep_them(tokenizer: CLIPTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    token = {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
    assert CLIPTokenizer.from_folder(tmp_path).pad == "!"  # Stable Diffusion 2: it wins over tokenizer_config.json
    assert CLIPTokenizer.from_folder(tmp_path)(HOSTILE).ids.tolist() == theirs(tmp_path, HOSTILE)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert CLIPTokenizer.from_folder(tmp_path).max_length == 77
    assert CLIPTokenizer.from_folder(tmp_path, max_length=16).max_length == 16


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("owl " * 18, ()),
        ("owl " * 19, ("owl",)),
        ("owl " * 18 + "taco, pizza!", ("taco,", "pizza!")),
        ("owl " * 17 + "taco, pizza!", ("taco,", "pizza!")),  # "taco" fits, its comma does not
        (" owl\n" * 18 + "  nai\u0308ve \u3000 🦉", ("nai\u0308ve", "🦉")),
        ("x" * 100, ("x" * 100,)),
    ],
)
def test_the_words_beyond_the_window_are_named(tokenizer: CLIPTokenizer, prompt: str, dropped: tuple[str, ...]) -> None:
    tokens = tokenizer([prompt, "an owl"])
    assert tokens.dropped == (dropped, ())
    assert tokens.ids.shape == (2, 20) and (tokens.ids[:, -1] == tokenizer.eos_id).all()


def test_prompts_that_are_no_unicode_are_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer(["owl \ud800"])
    assert tokenizer([]).ids.shape == (0, 20)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "end_of_word_suffix": null, "vocab": {}}, "added_tokens": []}'),
        ("tokenizer.json", "[1]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1}'),  # without the tokens of merges.txt
        ("merges.txt", "a b c\n"),
        ("merges.txt", None),
        ("vocab.json", None),
        ("special_tokens_map.json", '{"pad_token": "<none>"}'),
    ],
)
def test_damaged_tokenizers_are_refused(tokenizer: CLIPTokenizer, tmp_path, name: str, content: str | None) -> None:
    tokenizer.save(tmp_path)
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError):
        CLIPTokenizer.from_folder(tmp_path)


# -- the encoder ------------------------------------------------------------------------------------------------------

SMALL = CLIPTextConfig(
    vocab_size=548,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
    eos_token_id=547,
)
PROMPTS = ["a red owl", "", "owl " * 40, "a red owl", "three pizza on the left", "🦉"]


@pytest.fixture(scope="module")
def encoder(tokenizer: CLIPTokenizer) -> TextEncoder:
    torch.manual_seed(0)
    model = CLIPTextModel(SMALL).eval()
    for parameter in model.text_model.final_layer_norm.parameters():
        torch.nn.init.normal_(parameter)  # so that a forgotten norm shows
    return TextEncoder(tokenizer, model)


def test_embeddings_equal_those_of_transformers(encoder: TextEncoder) -> None:
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL.to_dict())).eval()
    oracle.load_state_dict({key.removeprefix("text_model."): v for key, v in encoder.model.state_dict().items()})
    with torch.no_grad():
        out = oracle(encoder.tokenizer(PROMPTS).ids, output_hidden_states=True)
        for skip in (None, 0, 1, 2):
            expected = oracle.final_layer_norm(out.hidden_states[-((skip or 0) + 1)])  # diffusers' encode_prompt
            found = encoder(PROMPTS, clip_skip=skip)
            assert found.context.shape == (6, 20, 32) and found.pooled is not None
            assert (found.context - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert (found.pooled - out.pooler_output).abs().max() <= 1e-5 * out.pooler_output.abs().max()


def test_a_prompt_alone_has_the_bits_it_has_in_a_batch(encoder: TextEncoder) -> None:
    batch = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        assert torch.equal(alone.context[0], batch.context[i]) and torch.equal(alone.pooled[0], batch.pooled[i])
    assert not batch.context.requires_grad and not torch.is_inference(batch.context)  # training may use it


def test_what_the_encoder_refuses_and_reports(encoder: TextEncoder) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        encoder([])
    with pytest.raises(UsageError, match="clip_skip 3"):
        encoder(["owl"], clip_skip=3)
    assert encoder.dropped(PROMPTS) == ((), (), ("owl",) * 22, (), (), ())


def test_conditionings_are_chosen_repeated_and_joined() -> None:
    context, pooled = torch.arange(12.0).view(3, 2, 2), torch.arange(3.0).view(3, 1)
    whole, bare = Conditioning(context, pooled), Conditioning(context)
    twice = whole.repeat(2)
    assert torch.equal(twice.context, context.repeat_interleave(2, 0)) and len(twice) == 6
    assert twice.pooled is not None and torch.equal(twice.pooled, pooled.repeat_interleave(2, 0))
    joined = Conditioning.cat([whole.select([2]), whole.select(slice(0, 2))])
    assert torch.equal(joined.context, context[[2, 0, 1]]) and torch.equal(joined.pooled, pooled[[2, 0, 1]])
    assert bare.repeat(3).pooled is None and Conditioning.cat([bare, bare]).pooled is None
    assert whole.to(dtype=torch.float16).context.dtype == whole.to(dtype=torch.float16).pooled.dtype == torch.float16
    with pytest.raises(UsageError, match="pooled"):
        Conditioning.cat([whole, bare])
