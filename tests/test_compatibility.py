"""Every family in every packing: what other programs write is opened, every tensor and setting compared with the
modules that wrote it, and saved again. The results are the tables of docs/compatibility.md.

    python tests/test_compatibility.py    # write that page
"""

import copy
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # for the one who runs this file

import pytest
import torch
from helpers import without_sockets
from safetensors.torch import load_file, save_file
from singles import LISTS, Model, model_of, narrow_families, single_state, write
from torch import Tensor, nn

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.checkpoints.single_file import open_single_file, open_vae, save_single_file
from ldm.errors import ModelError
from ldm.pipeline import Pipeline
from ldm.text.tokenizer import CLIPTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
COMMAND = "python tests/test_compatibility.py"
EPSILON, V, END = "epsilon", "v_prediction", "<|endoftext|>"
# What stock diffusers says of itself, nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
ZEROS, SCORE = ({flag: True} for flag in FLAGS)
SD, XL = "StableDiffusion", "StableDiffusionXL"
PNDM, DDIM, EULER = "PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"
ANCESTRAL = "EulerAncestralDiscreteScheduler"
Opened = Any  # Components, or a VAE alone


class Row(NamedTuple):
    """A published model: the pipeline and scheduler of its own repository, and what its U-Net predicts and is for."""

    title: str
    family: str = "sd1"
    channels: int = 4
    pipeline: str = f"{SD}Pipeline"  # "" where there is none: a VAE alone
    scheduler: str = PNDM
    prediction: str = EPSILON
    side: int = 64  # of its latents
    flags: Mapping[str, bool] = {}


ROWS = {
    "sd1": Row("Stable Diffusion 1"),
    "sd1-edit": Row("Stable Diffusion 1, instruct-pix2pix", "sd1", 8, f"{SD}InstructPix2PixPipeline", ANCESTRAL),
    "sd1-inpaint": Row("Stable Diffusion 1, inpainting", "sd1", 9, f"{SD}InpaintPipeline"),
    "sd2-v": Row("Stable Diffusion 2, v-prediction", "sd2", 4, f"{SD}Pipeline", DDIM, V, 96),
    "sd2": Row("Stable Diffusion 2, base", "sd2"),
    "sd2-inpaint": Row("Stable Diffusion 2, inpainting", "sd2", 9, f"{SD}InpaintPipeline"),
    "x4": Row("Stable Diffusion x4 upscaler", "x4-upscaler", 7, f"{SD}UpscalePipeline", DDIM, V, 128),
    "sdxl": Row("SDXL", "sdxl", 4, f"{XL}Pipeline", EULER, EPSILON, 128, ZEROS),
    "sdxl-edit": Row(
        "SDXL, instruct-pix2pix", "sdxl", 8, f"{XL}InstructPix2PixPipeline", ANCESTRAL, EPSILON, 128, ZEROS
    ),
    "sdxl-inpaint": Row("SDXL, inpainting", "sdxl", 9, f"{XL}InpaintPipeline", EULER, EPSILON, 128, ZEROS),
    "refiner": Row("SDXL refiner", "sdxl-refiner", 4, f"{XL}Img2ImgPipeline", EULER, EPSILON, 128, SCORE),
    "checker": Row("Stable Diffusion 1 with a safety checker"),
    "t5": Row("Stable Diffusion 1 with a T5 text encoder"),
    "bert": Row("Stable Diffusion 1 with a BERT text encoder"),
    "tiny": Row("Stable Diffusion 1 with a TAESD"),
    "vae": Row("VAE alone", pipeline=""),
    "taesd": Row("TAESD alone", pipeline=""),
}  # fmt: skip
WIDTH = 16  # of the text of the small Stable Diffusion 1
T5 = {"vocab_size": 32, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BERT = {"vocab_size": 32, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 40}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 24, "patch_size": 8, "projection_dim": 16}  # fmt: skip


# -- what the other libraries make ------------------------------------------------------------------------------------


@cache
def clip_tokenizer(pad: str) -> Any:
    """transformers' tokenizer of letters."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", END]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def shaken(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def parts_of(key: str, row: Row) -> dict[str, Any]:
    """The networks and tokenizers of a row, by the names of diffusers' pipelines."""
    made: dict[str, Any] = dict(model_of(FAMILIES[row.family], row.channels).networks)
    made["unet"].register_to_config(sample_size=row.side)
    if "text_encoder" in made:
        made["tokenizer"] = clip_tokenizer(END if row.family in ("sd1", "sdxl") else "!")
    if "text_encoder_2" in made:
        made["tokenizer_2"] = clip_tokenizer("!")
    if key == "t5":
        pieces = [("<pad>", 0.0), ("</s>", -1.0), ("<unk>", -2.0), ("▁", -3.0), ("a", -4.0)]
        made["text_encoder"] = shaken(transformers.T5EncoderModel(transformers.T5Config(**T5)))
        made["tokenizer"] = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    if key == "bert":
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "owl"])}
        made["text_encoder"] = shaken(transformers.BertModel(transformers.BertConfig(**BERT)))
        made["tokenizer"] = transformers.BertTokenizer(vocab=words)
    if key in ("tiny", "taesd"):
        made["vae"] = shaken(diffusers.AutoencoderTiny())
    if key == "checker":
        config = transformers.CLIPConfig(vision_config=VISION, projection_dim=16)
        made["safety_checker"] = shaken(StableDiffusionSafetyChecker(config))
    return made


def pipeline_of(row: Row, parts: Mapping[str, Any]) -> Any:
    """diffusers' pipeline of a row."""
    start, end = (0.0001, 0.02) if row.family == "x4-upscaler" else (0.00085, 0.012)
    own = {DDIM: {"clip_sample": False, "set_alpha_to_one": False}, PNDM: {"skip_prk_steps": True}}
    scheduler = getattr(diffusers, row.scheduler)(
        beta_start=start, beta_end=end, beta_schedule="scaled_linear", steps_offset=1, prediction_type=row.prediction,
        **own.get(row.scheduler, {}),
    )  # fmt: skip
    maker = getattr(diffusers, row.pipeline)
    checked = "safety_checker" in parts
    more: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    more |= {"scheduler": scheduler, "requires_safety_checker": checked, "add_watermarker": False}
    more |= {flag: row.flags.get(flag, False) for flag in FLAGS}
    more["low_res_scheduler"] = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    if checked:
        side = {"height": 24, "width": 24}
        more["feature_extractor"] = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=side)
    takes = maker.__init__.__annotations__.keys()
    return maker(**{name: part for name, part in (more | dict(parts)).items() if name in takes})


@dataclass
class Stock:
    """What the other libraries have of a row, and a folder for its files."""

    key: str
    place: Path

    @property
    def row(self) -> Row:
        return ROWS[self.key]

    @cached_property
    def pipe(self) -> Any:
        return pipeline_of(self.row, self.parts)

    @cached_property
    def parts(self) -> dict[str, Any]:
        return parts_of(self.key, self.row)

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        whole = self.pipe.components if self.row.pipeline else {"vae": self.parts["vae"]}
        return {name: part for name, part in whole.items() if isinstance(part, nn.Module)}

    @cached_property
    def single(self) -> dict[str, Tensor]:
        """The tensors of a single file, under the names of real ones."""
        if self.key == "taesd":
            return {key: value for half in halves(self.networks["vae"]).values() for key, value in half.items()}
        whole = single_state(self.row.family, Model(FAMILIES[self.row.family], self.parts_of_singles))
        if self.key == "vae":
            return {key.removeprefix(VAE): value for key, value in whole.items() if key.startswith(VAE)}
        return whole

    @property
    def parts_of_singles(self) -> dict[str, nn.Module]:
        return {name: self.parts[name] for name in FAMILIES[self.row.family].parts}

    def folder(self, name: str, half: bool = False, **options: Any) -> Path:
        """What diffusers' save_pretrained writes, once."""
        path = self.place / name
        if not path.exists():
            stock = self.pipe if self.row.pipeline else self.networks["vae"]
            (copy.deepcopy(stock).to(torch.float16) if half else stock).save_pretrained(path, **options)
        return path


def halves(tiny: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The two files of TAESD's authors, whose decoder counts a layer that has no weights."""
    found: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in tiny.state_dict().items():
        half, _, number, rest = key.split(".", 3)
        found[half][f"{int(number) + (half == 'decoder')}.{rest}"] = value
    return found


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module of theirs under our names, which are those of the published files."""
    state = dict(network.state_dict())
    kind = type(network).__name__
    if kind.startswith("CLIPTextModel"):
        inner = [key for key in state if not key.startswith(("text_model.", "text_projection."))]
        state |= {f"text_model.{key}": state.pop(key) for key in inner}
    if kind == "StableDiffusionSafetyChecker":  # transformers 5 leaves out one of two
        inner = [key for key in state if key.startswith("vision_model.") and key.count("vision_model.") == 1]
        state |= {f"vision_model.{key}": state.pop(key) for key in inner}
    if kind == "T5EncoderModel":
        assert torch.equal(state.pop("encoder.embed_tokens.weight"), state["shared.weight"])
    return state


# -- comparing --------------------------------------------------------------------------------------------------------


def same(ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """The same keys, and the same bits in `dtype`."""
    assert ours.keys() == stock.keys()
    for key, value in ours.items():
        assert torch.equal(value.to(dtype), stock[key].to(dtype)), key
        # in transformers, too, these layers of T5 stay in float32
        assert value.dtype == dtype or key.endswith(".wo.weight"), key


def plain(value: object) -> object:
    return json.loads(json.dumps(value))


def agree(ours: Mapping[str, Any], stock: Mapping[str, Any]) -> None:
    """Two configurations, in the fields that both have."""
    shared = ours.keys() & stock.keys() - {"_diffusers_version", "architectures"}
    assert len(shared) >= 3
    for name in shared:
        if isinstance(ours[name], dict):
            agree(ours[name], stock[name])
        else:
            assert plain(ours[name]) == plain(stock[name]), name


def check(
    stock: Stock, opened: Opened, dtype: torch.dtype = torch.float32, single: bool = False, shift: float = 0.0
) -> None:
    """Every tensor and every setting are those of the other libraries' modules.

    single: but for what of the scheduler a single file does not say. shift: what the U-Net's numbers are larger by.
    """
    networks = opened.networks if stock.row.pipeline else {"vae": opened}
    assert networks.keys() == stock.networks.keys()
    for name, network in stock.networks.items():
        shifted = shift if name == "unet" else 0.0
        same(networks[name].state_dict(), {key: value + shifted for key, value in state_of(network).items()}, dtype)
        config = network.config
        agree(networks[name].config.to_dict(), config.to_dict() if hasattr(config, "to_dict") else dict(config))
    if not stock.row.pipeline:
        return
    Pipeline(opened)  # reads the scheduler, and couples text encoders and U-Net
    row, config = stock.row, opened.scheduler_config
    assert opened.pipeline == row.pipeline and opened.flags == row.flags
    assert (config["_class_name"], config["prediction_type"]) == (row.scheduler, row.prediction)
    known = {key: value for key, value in stock.pipe.scheduler.config.items() if not key.startswith("_")}
    fields = {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps"} if single else known.keys()
    assert {key: config[key] for key in fields} == {key: plain(known[key]) for key in fields}
    assert bool(opened.low_res_scheduler_config) == hasattr(stock.pipe, "low_res_scheduler")
    for name, tokenizer in opened.tokenizers.items():
        assert tokenizer.pad == getattr(stock.pipe, name).pad_token


def opening(stock: Stock, path: Path, **options: Any) -> Opened:
    """A folder, a single file or a VAE."""
    if not stock.row.pipeline:
        config = None if stock.key == "taesd" else FAMILIES["sd1"].parts["vae"].config
        return open_vae(path, config=config, **options)
    return open_folder(path, **options) if path.is_dir() else open_single_file(path, **options)


# -- packings of a folder ---------------------------------------------------------------------------------------------


def in_folder(stock: Stock) -> None:
    check(stock, opening(stock, stock.folder("folder")))


def variant_asked(stock: Stock) -> None:
    path = shutil.copytree(stock.folder("folder"), stock.place / "both")
    shutil.copytree(stock.folder("half", True, variant="fp16"), path, dirs_exist_ok=True)
    check(stock, opening(stock, path, variant="fp16"), torch.float16)


def variant_found(stock: Stock) -> None:
    opened = opening(stock, stock.folder("half", True, variant="fp16"))
    check(stock, opened, torch.float16)
    assert not stock.row.pipeline or "took the fp16 ones" in opened.notes[-1]


def in_shards(stock: Stock) -> None:
    largest = min(sum(value.nbytes for value in state_of(n).values()) for n in stock.networks.values()) * 2 // 3
    path = stock.folder("shards", max_shard_size=largest)
    indices = {file.parent for file in path.rglob("*.safetensors.index.json")}
    assert indices == {file.parent for file in path.rglob("*.safetensors")} and len(indices) == len(stock.networks)
    check(stock, opening(stock, path))


def old_keys(stock: Stock) -> None:
    """The VAE's attention as until 2023; CLIP and the safety checker with the word that transformers 5 leaves out, or
    without it, and with the constant of old files; T5's embedding twice.
    """
    path = shutil.copytree(stock.folder("folder"), stock.place / "old")
    changed = set()
    for file in path.rglob("*.safetensors"):
        first, part = load_file(file), stock.networks["vae" if file.parent == path else file.parent.name]
        kind = type(part).__name__
        state = {respelled(kind, key): value for key, value in first.items()}
        if kind == "CLIPTextModel":
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        if kind == "T5EncoderModel":
            state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
        changed |= {kind} if state.keys() != first.keys() else set()
        save_file(state, file, {"format": "pt"})
    kinds = {type(part).__name__ for part in stock.networks.values()}
    assert changed == kinds - {"UNet2DConditionModel", "AutoencoderTiny", "BertModel"}
    check(stock, opening(stock, path))


def respelled(kind: str, key: str) -> str:
    """The key that other versions write, or wrote."""
    if kind == "AutoencoderKL":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    if kind == "CLIPTextModel":
        assert not key.startswith("text_model."), "transformers 5 leaves it out"
        return f"text_model.{key}"
    if kind == "CLIPTextModelWithProjection":
        assert key.startswith(("text_model.", "text_projection."))
        return key.removeprefix("text_model.")
    return f"vision_model.{key}" if kind == "StableDiffusionSafetyChecker" and key.startswith("vision_model.") else key


def bins(stock: Stock) -> Path:
    """The same folder with every file of weights pickled by torch."""
    path = stock.place / "bins"
    if not path.exists():
        shutil.copytree(stock.folder("folder"), path)
        for file in path.rglob("*.safetensors"):
            stem = file.stem.replace("model", "pytorch_model") if file.stem == "model" else file.stem
            torch.save(load_file(file), file.with_name(f"{stem}.bin"))
            file.unlink()
    return path


def bin_allowed(stock: Stock) -> None:
    check(stock, opening(stock, bins(stock), allow_pickle=True))


def bin_not_allowed(stock: Stock) -> None:
    opening(stock, bins(stock))


def saved_as_folder(stock: Stock) -> None:
    """Stock diffusers opens it, in the same class and with the same numbers and settings."""
    path = stock.place / "saved"
    save_folder(opening(stock, stock.folder("folder")), path, None)
    again = diffusers.DiffusionPipeline.from_pretrained(path, use_safetensors=True, local_files_only=True)
    assert type(again) is type(stock.pipe)
    networks = {name: part for name, part in again.components.items() if isinstance(part, nn.Module)}
    assert networks.keys() == stock.networks.keys()
    for name, network in stock.networks.items():
        same(networks[name].state_dict(), network.state_dict())
    for name in ("scheduler", "low_res_scheduler"):
        configs = [{k: v for k, v in getattr(p, name, again.scheduler).config.items() if k[0] != "_"}
                   for p in (stock.pipe, again)]  # fmt: skip
        assert configs[0] == configs[1]
    assert [again.config.get(flag) for flag in FLAGS] == [stock.pipe.config.get(flag) for flag in FLAGS]


# -- single files -----------------------------------------------------------------------------------------------------


def said(stock: Stock) -> dict[str, str]:
    """The metadata of the file: what is predicted where that is not the usual."""
    return {"modelspec.prediction_type": "epsilon"} if stock.key == "sd2" else {}


def in_one_file(stock: Stock) -> None:
    """In the names of real files; of TAESD its authors' two; also VAEs in diffusers' names."""
    if stock.key == "taesd":
        for half, state in halves(stock.networks["vae"]).items():
            path = write(stock.place / f"taesd_{half}.safetensors", state)
        check(stock, opening(stock, path))
    else:
        path = write(stock.place / "single.safetensors", stock.single, said(stock))
        check(stock, opening(stock, path), single=True)
    if not stock.row.pipeline:
        check(stock, opening(stock, write(path, stock.networks["vae"].state_dict())))


def averaged(stock: Stock) -> Path:
    """A file with EMA weights besides, named as LitEma names them: each larger by one."""
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
        for key, value in stock.single.items()
        if key.startswith(UNET)
    }
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return write(stock.place / "ema.safetensors", stock.single | averages | counts, said(stock))


def ema_left(stock: Stock) -> None:
    check(stock, opening(stock, averaged(stock)), single=True)


def ema_taken(stock: Stock) -> None:
    check(stock, opening(stock, averaged(stock), ema=True), single=True, shift=1.0)


def pickled(stock: Stock) -> Path:
    """As training programs pickle it; TAESD as its authors do."""
    if stock.key == "taesd":
        for half, state in halves(stock.networks["vae"]).items():
            torch.save(state, stock.place / f"taesd_{half}.pth")
        return stock.place / "taesd_decoder.pth"
    torch.save({"state_dict": stock.single, "global_step": 7}, stock.place / "model.ckpt")
    return stock.place / "model.ckpt"


def ckpt_allowed(stock: Stock) -> None:
    told = {"prediction_type": "epsilon"} if said(stock) else {}  # a pickle has no metadata
    check(stock, opening(stock, pickled(stock), allow_pickle=True, **told), single=True)


def ckpt_not_allowed(stock: Stock) -> None:
    opening(stock, pickled(stock))


def saved_as_one_file(stock: Stock) -> str:
    """From a folder: the names and numbers of the real list but for what is passed over, and what then is lost."""
    path = stock.place / "saved.safetensors"
    save_single_file(opening(stock, stock.folder("folder")), path)
    saved = load_file(path)
    lost = stock.single.keys() - saved.keys()
    assert lost <= LISTS.get(stock.row.family, {"unmatched": {}})["unmatched"].keys()
    same(saved, {key: value for key, value in stock.single.items() if key not in lost})
    gone = [f"{len(lost)} tensors"] if lost else []
    gone += ["the safety checker"] if stock.key == "checker" else []
    return f"equal but for {gone[0]}" if gone else "equal"


# -- the page ---------------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Callable[[Stock], str | None]]] = {
    "Folders": {
        "folder": in_folder,
        "fp16 asked for": variant_asked,
        "fp16 found": variant_found,
        "shards": in_shards,
        "old keys": old_keys,
        "`.bin`, allowed": bin_allowed,
        "`.bin`, not allowed": bin_not_allowed,
        "saved as folder": saved_as_folder,
    },
    "Single files": {
        "safetensors": in_one_file,
        "EMA passed over": ema_left,
        "EMA taken": ema_taken,
        "`.ckpt`, allowed": ckpt_allowed,
        "`.ckpt`, not allowed": ckpt_not_allowed,
        "saved as one file": saved_as_one_file,
    },
}
PACKINGS = {name: column for table in TABLES.values() for name, column in table.items()}
OPENED_SINGLE = {*TABLES["Single files"]} - {"saved as one file"}
ALONE = {"fp16 asked for", "saved as folder", "EMA passed over", "EMA taken", "saved as one file"}
ABSENT: dict[str, set[str]] = {  # what there is none of: no single file holds these, and no program has such a folder
    **dict.fromkeys(("checker", "t5", "bert", "tiny"), OPENED_SINGLE),
    "vae": ALONE,
    "taesd": ALONE | {"old keys"},
}
STRANGERS = {  # pipelines of folders, and a key of a single file -> the name that the refusal says
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "FluxPipeline": "Flux",
    "PixArtSigmaPipeline": "PixArt",
    "KandinskyV22Pipeline": "Kandinsky",
    "WuerstchenDecoderPipeline": "Wuerstchen",
    "StableCascadeDecoderPipeline": "Stable Cascade",
    "QwenImagePipeline": "Qwen-Image",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "double_blocks.0.img_attn.qkv.weight": "Flux",
    "edm_mean": "Playground v2.5",
    "model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": "Stable Video Diffusion",
    "embedder.model.visual.class_embedding": "Stable unCLIP",
    "depth_model.model.scratch.layer1_rn.weight": "Stable Diffusion 2 depth",
    "cc_projection.weight": "Stable Zero123",
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "LoRA",
    "control_model.input_blocks.0.0.weight": "ControlNet",
}


def finding(stock: Stock, packing: str) -> str:
    """A cell of the table. AssertionError: something opens and is not what it was."""
    if packing in ABSENT.get(stock.key, ()):
        return "-"
    try:
        return PACKINGS[packing](stock) or "equal"
    except ModelError as error:
        return "refused: " + str(error).replace(f"{stock.place}/", "").removeprefix("bins/")


Cells = dict[tuple[str, str], str]  # by title of the row and packing
INTRODUCTION = """# Compatibility

*Made by `tests/test_compatibility.py` of what it finds, with `{command}`; do not edit.*

**What opens.** Stable Diffusion 1.x and 2.x, the x4 upscaler, SDXL and its refiner: as a folder in diffusers' layout,
or in one file. A VAE or TAESD alone opens as the autoencoder of a model (`vae=`, `--vae`). In a folder the text
encoder may also be transformers' T5 or BERT, and there may be a safety checker. Opening is not drawing: models that
want a picture beside the words (inpainting, instruct-pix2pix, upscaler) say so when they are asked to draw from words
alone.

**What is refused**, with a sentence that names it:
{strangers};
and pickled weights (`.bin`, `.ckpt`, `.pt`, `.pth`), unless they are allowed (`allow_pickle=True`, `--allow-pickle`).
Then a process of its own reads them, which runs nothing of them.

**What is not kept.** Of Stable Diffusion 2's text encoder the last layer and the projection, which drawing does not
use and diffusers leaves out as well; constants of training and of CLIP; of EMA weights and those last trained the
ones that were not chosen (`ema=True`, `--ema`). A saved single file lacks as many tensors of the real list as its
cell says. It has no place for a safety checker.

**What the U-Net predicts** a folder says in its `scheduler_config.json`. In a single file the first of these decides
that says something: `prediction_type` as asked for, a tensor `v_pred`, `modelspec.prediction_type` in the metadata,
`modelspec.architecture`, and last what is usual: v-prediction for the x4 upscaler and for Stable Diffusion 2 with 4
channels (where both exist, so a note says that it is a guess), epsilon for all others.

**Everything here is offline.** Configurations and tokenizers of single files come with the package; only a hub id is
looked up, and only where `local_files_only` or `HF_HUB_OFFLINE` do not forbid it. The tests run without sockets.

**How to read the tables.** `equal`: every tensor of every network has the bits that it has in the module of diffusers
or transformers that wrote it (fp16: in float16), and configurations, pipeline class, scheduler, prediction and flags
are the same. `-`: there is no such thing. The networks have their true topology and a reduced width. Folders are
written by `save_pretrained` of diffusers' pipelines; old keys are those of the VAE's attention until 2023, and of
CLIP both with and without `text_model.`; single files have the key names of real ones (of the x4 upscaler, those that
diffusers' converter reads). What is saved as a folder is opened by stock diffusers, what is saved as one file has the
real keys; both are compared in the same way.
"""


def rendered(cells: Cells) -> str:
    """The page."""
    lines = [INTRODUCTION.format(strangers=fill(", ".join(dict.fromkeys(STRANGERS.values())), 118), command=COMMAND)]
    ordered = [cells[row.title, packing] for table in TABLES.values() for row in ROWS.values() for packing in table]
    sentences = list(dict.fromkeys(cell for cell in ordered if cell.startswith("refused: ")))
    for title, table in TABLES.items():
        lines += [f"## {title}\n", f"| | {' | '.join(table)} |", "|---" * (1 + len(table)) + "|"]
        for row in ROWS.values():
            found = [cells[row.title, packing] for packing in table]
            short = [f"refused ({sentences.index(cell) + 1})" if cell in sentences else cell for cell in found]
            lines.append(f"| {row.title} | {' | '.join(short)} |")
        lines.append("")
    lines.append("## Refusals\n")
    lines += [f"{i}. {cell.removeprefix('refused: ')}" for i, cell in enumerate(sentences, 1)]
    return "\n".join(lines) + "\n"


def parsed(page: str) -> Cells:
    """The cells of the page's tables, refusals with their sentences."""
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))
    cells: Cells = {}
    head: list[str] = []
    for line in page.splitlines():
        if not line.startswith("|"):
            head = []
        if not line.startswith("|") or line.startswith("|---"):
            continue
        first, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
        for packing, cell in zip(head, rest, strict=True) if head else ():
            number = re.fullmatch(r"refused \((\d+)\)", cell)
            cells[first, packing] = f"refused: {sentences[number[1]]}" if number else cell
        head = head or rest
    return cells


@contextmanager
def setting() -> Iterator[None]:
    """Narrow networks in place of the published ones, one thread, a tokenizer built once, and no network."""

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        narrow_families(patch)
        patch.setattr(CLIPTokenizer, "standard", cache(CLIPTokenizer.standard))
        without_sockets(patch)
        yield
    torch.set_num_threads(before)


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stock]]:
    with setting():
        yield cache(lambda key: Stock(key, tmp_path_factory.mktemp(key)))


QUICK = {
    (key, packing) for key in ("sd1", "vae", "taesd") for packing in PACKINGS if not packing.endswith("`, allowed")
}
QUICK |= {(key, "safetensors") for key in ("sd2-v", "x4", "sdxl", "refiner")}
QUICK |= {("sd2-v", "saved as one file"), ("sdxl", "folder"), ("vae", "`.bin`, allowed")}
CELLS = [
    pytest.param(key, packing, marks=() if (key, packing) in QUICK else pytest.mark.slow)
    for key in ROWS
    for packing in PACKINGS
]


@pytest.mark.parametrize(("key", "packing"), CELLS)
def test_the_page_says_what_is_found(stocks, key, packing):
    told = parsed(PAGE.read_text("utf-8")).get((ROWS[key].title, packing))
    assert finding(stocks(key), packing) == told, f"docs/{PAGE.name} is stale; run: {COMMAND}"


def test_the_page_holds_nothing_else():
    page = PAGE.read_text("utf-8")
    assert rendered(parsed(page)) == page, f"docs/{PAGE.name} is stale; run: {COMMAND}"


@pytest.mark.parametrize("form", STRANGERS)
def test_what_is_refused_is_named(tmp_path, form):
    path = tmp_path / "model"
    path.mkdir()
    if form.endswith("Pipeline"):
        (path / "model_index.json").write_text(json.dumps({"_class_name": form, "unet": ["diffusers", "Any"]}))
    else:
        path = write(tmp_path / "file.safetensors", {form: torch.zeros(4, 4)})
    with pytest.raises(ModelError, match=f" is an? {re.escape(STRANGERS[form])}"):
        Pipeline.from_pretrained(path)


def main() -> None:
    """Write the page."""
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    cells: Cells = {}
    with setting(), tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, row in ROWS.items():
            stock = Stock(key, Path(place) / key)
            stock.place.mkdir()
            cells |= {(row.title, packing): finding(stock, packing) for packing in PACKINGS}
            print(row.title, flush=True)
    PAGE.write_text(rendered(cells), "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
