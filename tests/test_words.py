"""Learned words in training: their vectors alone learn, with transformers' gradients, and every tool reads the file."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import files, small_model
from safetensors.torch import load_file
from test_inversion import WIDE, hers, same, state
from torch import Tensor, nn

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder
from ldm.conditioning import encoder_of
from ldm.errors import LdmError, ModelError, UsageError
from ldm.models.clip import CLIPTextModel
from ldm.pipeline import Pipeline
from ldm.text.encoder import Conditioning
from ldm.text.inversion import Embedding, attach, read_embedding
from ldm.text.transformers_text import TransformersText, TransformersTextConfig
from ldm.training.ema import EMA
from ldm.training.words import Words, write_embedding

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = (
    "a <cat-toy> beside an owl", "<cat-toy>", "an owl, <cat-toy>, a pizza", "a taco and an owl", "", "<cat-toy>",
    "<cat-toy> and <cat-toy>", "an owl " * 40 + "<cat-toy>",
)  # fmt: skip
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("words") / "net", 530)


@pytest.fixture(scope="module")
def opened(folder) -> Components:
    return open_folder(folder)


@pytest.fixture
def parts(opened) -> Components:
    """A model with one text encoder, no weight of which is at its neutral value."""
    parts = copy.deepcopy(opened, {id(opened.tokenizer): opened.tokenizer})  # which never changes
    shake(parts.text_encoder)
    return parts


@pytest.fixture
def pair(parts) -> Components:
    """The same with a second text encoder, wider and with a projection, whose tokenizer pads with another token."""
    config = replace(parts.text_encoder.config, hidden_size=WIDE, projection_dim=40, hidden_act="gelu")
    parts.text_encoder_2 = CLIPTextModel(config).eval()
    shake(parts.text_encoder_2)
    words = parts.tokenizer
    parts.tokenizer_2 = type(words)(words.vocab, words.merges, words.max_length, "!")
    return parts


@pytest.fixture(params=["one", "two"])
def either(request, parts) -> Components:
    """A model with one text encoder, then one with two."""
    return parts if request.param == "one" else request.getfixturevalue("pair")


def shake(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def encoders(c: Components) -> dict[str, CLIPTextModel]:
    return {name: each for name, each in c.networks.items() if name.startswith("text_encoder")}


def learned(c: Components, count: int = 3) -> Words:
    """A word whose vectors are no longer those of the table, as training would leave them."""
    words = Words.for_model(c, "<cat-toy>", "an owl", count)
    shake(words)
    return words


def loss(said: Conditioning) -> Tensor:
    """A sum of all numbers with fixed weights."""
    numbers = torch.cat([said.context.flatten(), said.pooled.flatten()]).float()
    return (numbers * torch.linspace(-1, 2, len(numbers)).cos()).sum() / 100


def apart(a: Conditioning, b: Conditioning) -> float:
    """The largest difference of any number."""
    pairs = ((a.context, b.context), (a.pooled, b.pooled))
    return max(float((x.detach().float() - y.detach().float()).abs().max()) for x, y in pairs)


# -- text states with gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_states_equal_those_of_a_call(either, clip_skip):
    """All in one call of each network, where a call of the encoder takes them one by one; equal ones once."""
    learned(either)
    encoder, sizes = encoder_of(either), []
    for network in encoders(either).values():
        network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    if either.is_xl and clip_skip:  # of two layers, SDXL's way has left out one
        with pytest.raises(UsageError, match="clip_skip 2"):
            encoder.states(PROMPTS, clip_skip)
        return
    states = encoder.states(PROMPTS, clip_skip)
    assert sizes == [len(set(PROMPTS))] * len(encoders(either))
    said = encoder(PROMPTS, clip_skip)
    assert sizes[len(encoders(either)) :] == [1] * len(set(PROMPTS)) * len(encoders(either))
    assert apart(states, said) <= 1e-6 * states.context.abs().max()
    assert states.context.requires_grad and states.pooled.requires_grad
    assert not said.context.requires_grad and not said.pooled.requires_grad
    with pytest.raises(UsageError, match="no prompts"):
        encoder.states([])


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """By the names that both libraries have; those of weights that were not used are left out."""
    found = {name.removeprefix("text_model."): parameter.grad for name, parameter in network.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}


def test_gradients_equal_those_of_transformers(either, tmp_path):
    """Of every weight of the text encoders, and of the word's vectors, which transformers has in its table."""
    words, tokenizers, theirs, said = learned(either), list(either.tokenizers.values()), {}, []
    for tokenizer, (key, network) in zip(tokenizers, encoders(either).items(), strict=True):
        with torch.no_grad():
            network.text_model.embeddings.token_embedding.weight[-3:] = words.rows[key]
        theirs[key], _ = hers(tmp_path / key, network, tokenizer)
        out = theirs[key].requires_grad_(True)(tokenizer(PROMPTS).ids, output_hidden_states=True)
        context = out.hidden_states[-2] if either.is_xl else out.last_hidden_state
        said.append(Conditioning(context, out.text_embeds if key == "text_encoder_2" else out.pooler_output))
    loss(Conditioning(torch.cat([one.context for one in said], -1), said[-1].pooled)).backward()
    loss(encoder_of(either).states(PROMPTS)).backward()
    with words.attached():
        loss(encoder_of(either).states(PROMPTS)).backward()
    for key, network in encoders(either).items():
        found, expected = gradients(network), gradients(theirs[key])
        assert found.keys() == expected.keys() and len(found) >= 18  # of a layer and the embeddings
        for name, grad in expected.items():
            if name.endswith("k_proj.bias"):  # a shift of all scores changes nothing: what is there is rounding
                assert max(found[name].abs().max(), grad.abs().max()) < 1e-6
            else:
                assert (found[name] - grad).abs().max() <= 1e-5 * max(grad.abs().max(), 1e-2), name
        rows = expected["embeddings.token_embedding.weight"][-3:]
        assert (words.rows[key].grad - rows).abs().max() <= 1e-5 * rows.abs().max()
        assert (rows.norm(dim=1) > 1e-3).all()


# -- what learns ------------------------------------------------------------------------------------------------------


@TYPES
def test_vectors_alone_learn(either, dtype):
    """After steps with weight decay over all there is, every other number has the bits that it had."""
    for network in encoders(either).values():
        network.to(dtype)
    words = Words.for_model(either, "<cat-toy>", count=3)
    before, begun = copy.deepcopy(state(either)), copy.deepcopy(words.state_dict())
    assert all(row.dtype == torch.float32 for row in words.parameters())
    everything = [*words.parameters(), *(p for network in encoders(either).values() for p in network.parameters())]
    optimizer = torch.optim.AdamW(everything, lr=1e-3, weight_decay=0.5)
    encoder, losses = encoder_of(either), []
    for _ in range(5):
        with words.attached():
            value = loss(encoder.states(PROMPTS))
            value.backward()
        assert all(row.grad.dtype == torch.float32 for row in words.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    assert same(state(either), before)
    assert all(p.requires_grad for p in everything)  # as before
    for name, row in words.state_dict().items():
        changed = row - begun[name]
        assert (begun[name] == begun[name][0]).all() and (changed.abs().amax(1) > 1e-3).all()
        assert (row[0] != row[1]).any() and (row[1] != row[2]).any()  # equal ones part


def test_gradients_are_summed_in_float32(parts):
    """A thousand places of one vector, of gradient 1 each; in bfloat16 their sum would stay at 256."""
    parts.text_encoder.to(torch.bfloat16)
    words = Words.for_model(parts, "<cat-toy>")
    first = len(parts.tokenizer) - 1
    with words.attached():
        said = parts.text_encoder.text_model.embeddings.token_embedding(torch.full((10, 100), first))
        assert said.dtype == torch.bfloat16
        said.float().sum().backward()
    assert (words.rows["text_encoder"].grad == 1000).all()


def test_taken_off_whatever_happens(parts):
    """The networks have their own vectors and gradients again, also after an error."""
    words, encoder = learned(parts), encoder_of(parts)
    bare = encoder(PROMPTS)
    parts.text_encoder.text_model.final_layer_norm.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in parts.text_encoder.parameters()]
    with pytest.raises(KeyError), words.attached():
        assert not any(parameter.requires_grad for parameter in parts.text_encoder.parameters())
        assert apart(encoder(PROMPTS), bare) > 1e-3
        raise KeyError
    assert apart(encoder(PROMPTS), bare) == 0
    assert [parameter.requires_grad for parameter in parts.text_encoder.parameters()] == asked


# -- what it begins as ------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("count", [1, 2, 5])
def test_beginnings(pair, dtype, count):
    """The vectors of the initializer's tokens in turn, repeated or cut; without any the mean of all tokens'."""
    tables = {}
    for key, network in encoders(pair).items():
        table = network.text_model.embeddings.token_embedding
        spare = torch.full((9, table.embedding_dim), 50.0)  # rows that no token has
        table.weight = nn.Parameter(torch.cat([table.weight, spare]))
        network.config = replace(network.config, vocab_size=len(table.weight))
        tables[key] = network.to(dtype).text_model.embeddings.token_embedding.weight.detach()
    plain = copy.deepcopy(pair)
    vocab, size = pair.tokenizer.vocab, len(pair.tokenizer)
    for said, spelt in {"an owl": ("an</w>", "owl</w>"), "zq": ("z", "q</w>")}.items():
        ids = [vocab[token] for token in spelt * 5][:count]
        for key, row in Words.for_model(pair, f"<{said[0]}>", said, count).rows.items():
            assert row.dtype == torch.float32 and torch.equal(row, tables[key][ids].float())
    for key, row in Words.for_model(plain, "<mean>", " \n", count).rows.items():
        mean = tables[key][:size].double().mean(0)
        assert row.shape == (count, len(mean)) and (row - mean).abs().max() <= 1e-6


# -- what is drawn and written ----------------------------------------------------------------------------------------


@TYPES
def test_drawn_as_it_will_be_loaded(folder, tmp_path, dtype):
    """A Pipeline draws with the word while it is attached as one that loads its file does, and before as it began."""
    parts = open_folder(folder, dtype)
    words = learned(parts)
    pipeline, prompts = Pipeline(parts), ["a <cat-toy> beside an owl", "an owl"]

    def drawn(pipe: Pipeline) -> Tensor:
        return pipe(prompts, seed=3, num_inference_steps=2, output_type="latent").images

    with words.attached():
        said, pictures = pipeline.text_encoder(PROMPTS), drawn(pipeline)
    write_embedding(words.embedding(), tmp_path / "word.safetensors")
    fresh = Pipeline(open_folder(folder, dtype))
    assert fresh.load_textual_inversion(tmp_path / "word.safetensors") == "<cat-toy>"
    assert apart(fresh.text_encoder(PROMPTS), said) <= 1e-6
    assert torch.equal(drawn(fresh), pictures)
    begun = drawn(pipeline)
    assert torch.equal(begun[1], pictures[1]) and (begun[0] - pictures[0]).abs().max() > 1e-3


def test_written_and_read(either, tmp_path):
    """The numbers come back to the last bit; training on does not change what was taken."""
    plain = copy.deepcopy(either)
    words = learned(either)
    taken = words.embedding()
    write_embedding(taken, tmp_path / "<cat-toy>.safetensors")
    found = read_embedding(tmp_path / "<cat-toy>.safetensors")
    assert found.name == "<cat-toy>" and found.vectors.keys() == taken.vectors.keys()
    assert all(torch.equal(found.vectors[width], rows) for width, rows in taken.vectors.items())
    with words.attached():
        said = encoder_of(either)(PROMPTS)
        shake(words)
        assert apart(encoder_of(either)(PROMPTS), said) > 1e-3
    attach(plain, taken)
    assert apart(encoder_of(plain)(PROMPTS), said) <= 1e-6


def theirs_said(network, words, pipe) -> tuple[Tensor, Tensor]:
    """transformers' last hidden states and those before, of the prompts as diffusers spells them."""
    spelt = pipe.maybe_convert_prompt(list(PROMPTS), words)
    ids = words(spelt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = network(ids, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states[-2]


@pytest.mark.parametrize("count", [1, 4])
def test_diffusers_reads_it(parts, tmp_path, count):
    """Stock diffusers' load_textual_inversion, and transformers' states."""
    from diffusers import StableDiffusionPipeline

    network, words = hers(tmp_path / "hers", parts.text_encoder, parts.tokenizer)
    ours = learned(parts, count)
    write_embedding(ours.embedding(), tmp_path / "learned_embeds.safetensors")
    none = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(text_encoder=network, tokenizer=words, requires_safety_checker=False, **none)
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    with ours.attached():
        said = encoder_of(parts)(PROMPTS).context
    assert (said - theirs_said(network, words, pipe)[0]).abs().max() <= 1e-5


def test_diffusers_reads_the_pair(pair, tmp_path):
    """SDXL: the two calls that diffusers documents, with the halves of one file."""
    from diffusers import StableDiffusionXLPipeline

    first, words = hers(tmp_path / "1", pair.text_encoder, pair.tokenizer)
    second, words_2 = hers(tmp_path / "2", pair.text_encoder_2, pair.tokenizer_2)
    ours = learned(pair)
    write_embedding(ours.embedding(), tmp_path / "word.safetensors")
    halves = load_file(tmp_path / "word.safetensors")
    pipe = StableDiffusionXLPipeline(None, first, second, words, words_2, None, None, add_watermarker=False)
    pipe.load_textual_inversion(halves["clip_l"], token="<cat-toy>", text_encoder=first, tokenizer=words)
    pipe.load_textual_inversion(halves["clip_g"], token="<cat-toy>", text_encoder=second, tokenizer=words_2)
    pairs = ((first, words), (second, words_2))
    with ours.attached():
        said = encoder_of(pair)(PROMPTS).context
    theirs = torch.cat([theirs_said(network, each, pipe)[1] for network, each in pairs], -1)
    assert (said - theirs).abs().max() <= 1e-5


def test_writing_refused(parts, tmp_path):
    """What stood there before stands there still."""
    words = Words.for_model(parts, "<cat-toy>")
    write_embedding(words.embedding(), tmp_path / "word.safetensors")
    before = (tmp_path / "word.safetensors").read_bytes()
    with torch.no_grad():
        words.rows["text_encoder"][0, 5] = torch.nan
    with pytest.raises(ModelError, match="'<cat-toy>' has numbers that are not finite"):
        write_embedding(words.embedding(), tmp_path / "word.safetensors")
    assert files(tmp_path) == ["word.safetensors"] and (tmp_path / "word.safetensors").read_bytes() == before
    with pytest.raises(LdmError, match="cannot write"):
        write_embedding(Embedding("x", {32: torch.ones(1, 32)}), tmp_path / "no" / "word.safetensors")


# -- copies -----------------------------------------------------------------------------------------------------------


def test_running_average(either):
    """A copy has rows of its own and the networks of the first; it speaks where it is attached last."""
    words = learned(either)
    assert list(words.state_dict()) == [f"rows.{key}" for key in encoders(either)]
    average = EMA(words, 0.5)
    shake(words)
    average.update(100)
    encoder = encoder_of(either)
    with average.model.attached():
        mean = encoder(PROMPTS)
    with words.attached():
        now = encoder(PROMPTS)
        with average.model.attached():
            assert apart(encoder(PROMPTS), mean) == 0
        assert apart(encoder(PROMPTS), now) == 0 and apart(now, mean) > 1e-3
    assert not any(row.requires_grad for row in average.model.parameters())
    assert all(row.requires_grad for row in words.parameters())
    words.load_state_dict(average.model.state_dict())
    with words.attached():
        assert apart(encoder(PROMPTS), mean) == 0


def test_spelling_and_numbers(parts):
    """The word is the one that attach makes of it, and the tokens are where it says."""
    attach(parts, Embedding("first", {32: torch.ones(2, 32)}))
    words = Words.for_model(parts, "  nai\u0308ve   word ", "owl", 3)
    assert words.name == words.embedding().name == "na\u00efve word"
    with torch.no_grad():
        words.rows["text_encoder"].copy_(torch.arange(96.0).reshape(3, 32))
    attach(parts, Embedding("later", {32: torch.full((2, 32), 7.0)}))
    ids = parts.tokenizer(["a na\u00efve word, first later"]).ids
    with words.attached(), torch.no_grad():
        said = parts.text_encoder.text_model.embeddings.token_embedding(ids)[0]
    assert torch.equal(said[2:5], torch.arange(96.0).reshape(3, 32))
    assert (said[6:8] == 1).all() and (said[8:10] == 7).all()


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {  # name, number of vectors -> what is said
    "none": ("<cat-toy>", 0, ("0 vectors", "at least 1")),
    "too many": ("<cat-toy>", 76, ("76 vectors", "room for 75")),
    "a word": ("owl", 1, ("'owl' is a word",)),
    "taken": ("first", 1, ("'first' is a word",)),
    "empty": (" ", 1, ("is no name",)),
    "a key": (" clip_l ", 1, ("clip_l", "another name")),
    "the table": ("__metadata__", 1, ("another name",)),
    "a path": ("up\n../down", 1, ("another name",)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_change_nothing(kind, pair):
    token, count, said = REFUSED[kind]
    attach(pair, Embedding("first", {32: torch.ones(1, 32), WIDE: torch.ones(1, WIDE)}))
    before = state(pair)
    with pytest.raises(UsageError) as error:
        Words.for_model(pair, token, "an owl", count)
    assert all(words in str(error.value) for words in said), error.value
    assert same(state(pair), before)


def test_models_without_such_tables_are_refused(pair):
    """T5 and BERT, and two text encoders that a file could not tell apart."""
    pair.text_encoder_2 = copy.deepcopy(pair.text_encoder)
    with pytest.raises(UsageError, match="of one width"):
        Words.for_model(pair, "<cat-toy>")
    config = TransformersTextConfig.from_dict({"architectures": ["T5EncoderModel"]})
    other = TransformersText(config, nn.Linear(1, 1), SimpleNamespace(model_max_length=77))
    for left in (None, pair.tokenizer_2):  # alone, or beside one of CLIP's
        model = replace(pair, text_encoder=other, tokenizer=None, tokenizer_2=left, name="t5-model")
        model.text_encoder_2 = pair.text_encoder_2 if left else None
        with pytest.raises(UsageError, match=r"'t5-model' is not CLIP's.*train without the word '<cat-toy>'"):
            Words.for_model(model, "<cat-toy>")
