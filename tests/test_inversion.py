"""Learned words: files of every tool are read, attached as diffusers attaches them, and taken away to the last bit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import small_model
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder
from ldm.checkpoints.safe import atomic_json, atomic_save_safetensors
from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextModel
from ldm.text.encoder import TextEncoder
from ldm.text.inversion import Embedding, attach, read_embedding

PROMPTS = (
    "a <cat-toy> beside an owl", "<cat-toy>", "an owl, <cat-toy>, a pizza", "an owl<cat-toy>", "a taco and an owl",
    "(<cat-toy>:1.2) and <cat-toy>", "  a   pizza\n<cat-toy> ", "an owl " * 40 + "<cat-toy>",
)  # fmt: skip
WIDE = 48  # of the second text encoder; the first has 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("words") / "net", 530)


@pytest.fixture
def parts(folder) -> Components:
    return open_folder(folder)


@pytest.fixture
def pair(parts) -> Components:
    """The same with a second text encoder, wider and with a projection, whose tokenizer pads with another token."""
    config = replace(parts.text_encoder.config, hidden_size=WIDE, projection_dim=40, hidden_act="gelu")
    parts.text_encoder_2 = CLIPTextModel(config).eval()
    words = parts.tokenizer
    parts.tokenizer_2 = type(words)(words.vocab, words.merges, words.max_length, "!")
    return parts


def state(c: Components) -> list[object]:
    """All that attaching changes, copied."""
    encoders = [each for each in (c.text_encoder, c.text_encoder_2) if each is not None]
    words = [each for each in (c.tokenizer, c.tokenizer_2) if each is not None]
    tables = [{name: value.clone() for name, value in each.state_dict().items()} for each in encoders]
    ids = [each(PROMPTS).ids for each in words]
    rows = [each.text_model.embeddings.token_embedding.num_embeddings for each in encoders]
    return [tables, ids, [each.config for each in encoders], [(len(each), each.added) for each in words], rows]


def same(a: object, b: object) -> bool:
    """Equal to the last bit, tensors too."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


def hers(folder: Path, encoder: CLIPTextModel, tokenizer):
    """transformers' text encoder and tokenizer with these weights and words."""
    from transformers import CLIPTextModel as Plain
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir()
    atomic_save_safetensors(encoder.state_dict(), folder / "model.safetensors")
    atomic_json(folder / "config.json", encoder.config.to_dict())
    tokenizer.save(folder / "words")
    kind = CLIPTextModelWithProjection if encoder.config.projection_dim else Plain
    return kind.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder / "words")


def compare(pipe, theirs, words, encoder, tokenizer) -> None:
    """Ids, table and hidden states of one text encoder are those of diffusers."""
    spelt = pipe.maybe_convert_prompt(list(PROMPTS), words)
    ids = words(spelt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(PROMPTS).ids, ids)
    table = encoder.text_model.embeddings.token_embedding.weight
    assert (table - theirs.get_input_embeddings().weight).abs().max() <= 1e-6
    with torch.no_grad():
        ours = TextEncoder(tokenizer, encoder)(PROMPTS)
        said = theirs(ids)
    assert (ours.context - said.last_hidden_state).abs().max() <= 1e-5
    if encoder.config.projection_dim:
        assert (ours.pooled - said.text_embeds).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 32)])
def test_equal_to_diffusers(parts, folder, tmp_path, shape):
    """One vector or several, from one file: the same ids, the same table, the same hidden states."""
    from diffusers import StableDiffusionPipeline

    save_file({"<cat-toy>": torch.randn(shape)}, tmp_path / "learned_embeds.safetensors")
    theirs, words = hers(tmp_path / "hers", parts.text_encoder, parts.tokenizer)
    none = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(text_encoder=theirs, tokenizer=words, requires_safety_checker=False, **none)
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    found = read_embedding(tmp_path / "learned_embeds.safetensors")
    assert found.name == "<cat-toy>"
    attach(parts, found)
    compare(pipe, pipe.text_encoder, pipe.tokenizer, parts.text_encoder, parts.tokenizer)


def test_pair_equal_to_diffusers(pair, tmp_path):
    """SDXL: one file, one call; diffusers takes two calls with the halves of it."""
    from diffusers import StableDiffusionXLPipeline

    for name in ("text_encoder", "text_encoder_2"):  # where the end of a text is stated, diffusers finds it too
        encoder = getattr(pair, name)
        encoder.config = replace(encoder.config, eos_token_id=pair.tokenizer.eos_id)
    halves = {"clip_l": torch.randn(3, 32), "clip_g": torch.randn(3, WIDE)}
    save_file(halves, tmp_path / "web.safetensors")
    first, words = hers(tmp_path / "1", pair.text_encoder, pair.tokenizer)
    second, words_2 = hers(tmp_path / "2", pair.text_encoder_2, pair.tokenizer_2)
    pipe = StableDiffusionXLPipeline(None, first, second, words, words_2, None, None, add_watermarker=False)
    for key, encoder, tokenizer in (("clip_l", first, words), ("clip_g", second, words_2)):
        pipe.load_textual_inversion(
            {"<cat-toy>": halves[key]}, token="<cat-toy>", text_encoder=encoder, tokenizer=tokenizer
        )
    found = read_embedding(tmp_path / "web.safetensors")
    assert (found.name, sorted(found.vectors)) == ("web", [32, WIDE])
    attach(pair, found, "<cat-toy>")
    compare(pipe, first, words, pair.text_encoder, pair.tokenizer)
    compare(pipe, second, words_2, pair.text_encoder_2, pair.tokenizer_2)


def test_pooled_vector_is_of_the_end(pair, tmp_path):
    """A config.json of before 2023 finds the end of a text by its largest id, which a learned word would now be."""
    assert pair.text_encoder_2.config.eos_token_id == 2
    attach(pair, Embedding("<cat-toy>", {32: torch.randn(2, 32), WIDE: torch.randn(2, WIDE)}))
    known = replace(pair.text_encoder_2.config, eos_token_id=pair.tokenizer.eos_id)
    theirs, _ = hers(tmp_path / "2", pair.text_encoder_2, pair.tokenizer_2)
    assert theirs.config.eos_token_id == known.eos_token_id
    ids = pair.tokenizer_2(PROMPTS).ids
    with torch.no_grad():
        assert (pair.text_encoder_2(ids)[1] - theirs(ids).text_embeds).abs().max() <= 1e-5
    assert len({tuple(row) for row in ids.tolist()}) == len(PROMPTS)


FILES = {  # what is in a file -> the name it gives and how many vectors of what width
    "diffusers": ({"<cat-toy>": torch.ones(32)}, "<cat-toy>", {32: 1}),
    "diffusers, nameless": ({"*": torch.ones(4, 32)}, "style", {32: 4}),
    "kohya": ({"emb_params": torch.ones(2, 32)}, "style", {32: 2}),
    "SDXL": ({"clip_g": torch.ones(2, WIDE), "clip_l": torch.ones(2, 32)}, "style", {32: 2, WIDE: 2}),
    "SDXL, one vector": ({"clip_g": torch.ones(WIDE), "clip_l": torch.ones(32)}, "style", {32: 1, WIDE: 1}),
    "half precision": ({"emb_params": torch.ones(2, 32).half()}, "style", {32: 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files(kind, tmp_path):
    tensors, name, counts = FILES[kind]
    save_file(tensors, tmp_path / "style.safetensors")
    found = read_embedding(tmp_path / "style.safetensors")
    assert found.name == name and {width: len(rows) for width, rows in found.vectors.items()} == counts
    assert all(torch.equal(rows, torch.ones_like(rows)) for rows in found.vectors.values())


PICKLED = {
    "learned_embeds.bin": {"<cat-toy>": torch.arange(32.0)},
    "style.pt": {
        "string_to_token": {"*": 265}, "string_to_param": {"*": torch.arange(64.0).reshape(2, 32)}, "name": "style",
        "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None,
    },
}  # fmt: skip


@pytest.mark.usefixtures("pickles_here")
@pytest.mark.parametrize("name", PICKLED)
def test_pickled_files(name, parts, tmp_path):
    """Refused with the way to open them; opened by it."""
    torch.save(PICKLED[name], tmp_path / name)
    with pytest.raises(ModelError, match=re.escape(name)):
        read_embedding(tmp_path / name)
    found = read_embedding(tmp_path / name, True)
    word, rows = ("style", 2) if name == "style.pt" else ("<cat-toy>", 1)
    assert found.name == word
    assert torch.equal(found.vectors[32].flatten(), torch.arange(32.0 * rows))
    attach(parts, found)
    assert parts.tokenizer([word]).ids[0, 1 : rows + 1].tolist() == [
        len(parts.tokenizer) - rows + i for i in range(rows)
    ]


WRONG = {
    "two tensors": ({"a": torch.ones(32), "b": torch.ones(32)}, "2 tensors (a, b)"),
    "a matrix of matrices": ({"a": torch.ones(1, 2, 32)}, "no textual-inversion embedding"),
    "a number": ({"a": torch.ones(())}, "no textual-inversion embedding"),
    "whole numbers": ({"a": torch.ones(2, 32).int()}, "no textual-inversion embedding"),
    "nothing": ({}, "0 tensors"),
    "no vectors": ({"a": torch.ones(0, 32)}, "0 vectors"),
    "no numbers": ({"a": torch.ones(2, 0)}, "vectors of 0 numbers"),
    "a table of all words": ({"a": torch.ones(76, 4)}, "76 vectors"),
    "NaN": ({"a": torch.tensor([1.0, torch.nan])}, "not finite"),
    "infinity": ({"a": torch.tensor([[1.0, torch.inf]])}, "not finite"),
    "halves of other lengths": ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(3, WIDE)}, "not one embedding"),
    "halves of one width": ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}, "not one embedding"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_none_is_refused(kind, tmp_path):
    tensors, said = WRONG[kind]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=re.escape(said)) as error:
        read_embedding(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def rows(count: int = 1, *widths: int, value: float = 0.5) -> dict[int, Tensor]:
    return {width: torch.full((count, width), value) for width in widths or (32,)}


REFUSED = {  # of the model with one text encoder -> what is said
    "another family": (Embedding("x-y", rows(1, 1024)), ("Stable Diffusion 2", "1024", "32", "made for it")),
    "a pair": (Embedding("x-y", rows(1, 32, WIDE)), ("32 and 48",)),
    "too many": (Embedding("x-y", rows(76)), ("76 vectors", "room for 75")),
    "empty name": (Embedding("  ", rows()), ("is no name",)),
    "escape": (Embedding("a\x1b[31mb", rows()), ("is no name", r"\x1b")),
    "endless name": (Embedding("x" * 200, rows()), ("is no name", "128")),
    "a word": (Embedding("owl", rows()), ("'owl' is a word",)),
    "a word in capitals": (Embedding("OWL", rows()), ("'owl' is a word",)),
    "a letter": (Embedding("a", rows()), ("'a' is a word",)),
    "special": (Embedding("<|endoftext|>", rows()), ("is a word",)),
    "holds a special": (Embedding("x<|endoftext|>y", rows()), ("read as other words",)),
    "taken": (Embedding("first", rows()), ("'first' is a word",)),
    "taken in capitals": (Embedding("First", rows()), ("'first' is a word",)),
    "takes a part": (Embedding("first_2", rows()), ("numbered like a part",)),
    "has a part": (Embedding("zweites", rows(3)), ("'zweites_2' is a word",)),
    "lengthens": (Embedding("zweites", rows(2)), ("numbered like a part",)),
    "overflows": (Embedding("x-y", rows(1, value=1e6)), ("not finite in torch.float16", "float32")),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_change_nothing(kind, parts):
    embedding, said = REFUSED[kind]
    parts.text_encoder.half()
    attach(parts, Embedding("first", rows(2)))
    attach(parts, Embedding("zweites_2", rows()))
    before = state(parts)
    with pytest.raises(UsageError) as error:
        attach(parts, embedding)
    assert all(words in str(error.value) for words in said), error.value
    assert same(state(parts), before)


def test_second_encoder_refuses_for_both(pair):
    """What only the second text encoder refuses leaves the first as it was."""
    before = state(pair)
    pair.text_encoder_2.half()
    before[0][1] = {name: value.half() for name, value in before[0][1].items()}
    with pytest.raises(UsageError, match="not finite"):
        attach(pair, Embedding("x-y", rows(2, 32, WIDE, value=1e6)))
    for widths in ((32,), (WIDE,), (32, 1024), (32, WIDE, 1024)):
        with pytest.raises(UsageError, match="made for it"):
            attach(pair, Embedding("x-y", rows(1, *widths)))
    assert same(state(pair), before)


def test_published_families_are_named(parts):
    """The sentence for a person who took the file of another family."""
    parts.text_encoder.config = replace(parts.text_encoder.config, hidden_size=768)
    parts.name = "sd15"
    with pytest.raises(UsageError) as error:
        attach(parts, Embedding("bad-hands", rows(2, 1024)))
    assert str(error.value) == (
        "the embedding 'bad-hands' is for Stable Diffusion 2 (1024 numbers a vector) and the model 'sd15' is of "
        "Stable Diffusion 1 (768 numbers a vector); take one that was made for it"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taken_away_to_the_last_bit(pair, dtype):
    """Also with a second one between, in the order in which they go, and with spare rows at the end of the table."""
    for encoder in (pair.text_encoder, pair.text_encoder_2):
        table = encoder.text_model.embeddings.token_embedding
        table.weight = torch.nn.Parameter(torch.randn(540, table.embedding_dim))  # ten that no token has
        table.num_embeddings, encoder.config = 540, replace(encoder.config, vocab_size=540)
        encoder.to(dtype)
    before, size = state(pair), len(pair.tokenizer)
    first = attach(pair, Embedding("<cat-toy>", rows(3, 32, WIDE)))
    between = state(pair)
    assert not same(between, before) and pair.text_encoder.config.vocab_size == 543
    second = attach(pair, Embedding("Style", rows(2, 32, WIDE)))
    assert pair.tokenizer(["STYLE <cat-toy> owl"]).ids[0, 1:6].tolist() == [
        size + 3,
        size + 4,
        size,
        size + 1,
        size + 2,
    ]
    with pytest.raises(UsageError, match="'<cat-toy>' is not the embedding that was attached last"):
        first()
    second()
    assert same(state(pair), between)
    first()
    assert same(state(pair), before)
    with pytest.raises(UsageError):
        first()
    assert same(state(pair), before)


def test_refiner_takes_its_half(pair):
    """SDXL's refiner has the second text encoder alone, and goes with the pair of the base."""
    pair.text_encoder, pair.tokenizer, size = None, None, len(pair.tokenizer_2)
    attach(pair, Embedding("x-y", rows(2, 32, WIDE)))
    assert pair.tokenizer_2(["x-y"]).ids[0, 1:3].tolist() == [size, size + 1]


def test_cut_prompts_lose_whole_names(parts):
    """Where the vectors of a name do not all fit, the name is told as lost, once."""
    attach(parts, Embedding("<cat-toy>", rows(5)))
    fits = " ".join(["owl"] * 70 + ["<cat-toy>"])
    assert parts.tokenizer([fits, f"owl {fits}, an owl"]).dropped == ((), ("<cat-toy>,", "an", "owl"))


def test_saved_model_keeps_its_words(parts, tmp_path):
    """A folder written while a word is attached has it when it is opened again, in all its vectors."""
    from ldm.checkpoints.folder import save_folder

    attach(parts, Embedding("<cat-toy>", rows(3)))
    save_folder(parts, tmp_path / "net", torch.float32)
    again = open_folder(tmp_path / "net")
    assert torch.equal(again.tokenizer(PROMPTS).ids, parts.tokenizer(PROMPTS).ids)
    ours, theirs = (TextEncoder(each.tokenizer, each.text_encoder)(PROMPTS) for each in (parts, again))
    assert torch.equal(ours.context, theirs.context)
