"""`ldm info`: what a model, a file of weights or a picture is, from what stands in its header; nothing is loaded."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import printable
from ldm.errors import LdmError

if TYPE_CHECKING:
    from ldm.checkpoints.safe import Entry, Header
    from ldm.checkpoints.spelling import Spelling

LISTED, LONG = 12, 100  # how many entries of a file's own metadata are shown, and how many characters of a line
QUICK = 512 * 2**20  # bytes that are hashed unasked, in about a second
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DIALECTS = (  # whose names a LoRA's tensors have
    (r"lora_(unet|te\d?)_", "kohya's"),
    (r".*[._]lora_(A|B)\.", "PEFT's"),
    (r".*(\.lora|_lora|lora_linear_layer)\.(down|up)\.", "diffusers'"),
)
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL refiner"}
OTHERS = (  # names that tell where there is no such width
    (r".*(double_blocks|single_blocks|single_transformer_blocks)[._]\d", "Flux"),
    (r".*(joint_blocks|transformer\.transformer_blocks)[._]\d", "Stable Diffusion 3"),
    (r"lora_te[12]_|(.*\.)?text_encoder_2\.", "SDXL"),
)
FACTOR = r"(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.\w+)?)\.weight|(hada_w1_b|lokr_w[12]_b)"
RANK = re.compile(rf".+?[._]({FACTOR})")  # tensors whose first side is the rank of a low-rank layer
LAYER = re.compile(r"(.+?)[._](alpha|dora_scale|diff(_b)?|lora|hada|lokr)([._].*)?")
CONTEXT = re.compile(rf".*attn2[._](processor\.)?to_k([._]({FACTOR})|\.weight)")  # [.., width of the text]
VARIANTS = {"hada_w": "LoHa", "lokr_w": "LoKr", "dora_scale": "DoRA", "lora_magnitude": "DoRA", "lora_mid": "Tucker"}
SHAPES = {  # what to say of the shapes: which tensor, and which of its sides
    "channels in": (r"(model\.diffusion_model\.|control_model\.)?(conv_in|input_blocks\.0\.0)\.weight", 1),
    "channels out": (r"(model\.diffusion_model\.)?(conv_out|out\.2)\.weight", 0),
    "latent channels": (r"(first_stage_model\.)?decoder\.conv_in\.weight", 1),
    "words": (r".*token_embedding\.weight", 0),
    "width of a word": (r".*token_embedding\.weight", 1),
}
LICENCES = ("modelspec.license", "license", "licence")

Rows = dict[str, Any]


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="picture, weights of any kind, or model folder")],
    tensors: Annotated[bool, typer.Option("--tensors", help="also list every tensor with its type and shape")] = False,
    hashed: Annotated[bool, typer.Option("--hash", help="the sha256 of a large file too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the same as a JSON object, nothing cut short")] = False,
) -> None:
    """Say what a picture, a file of weights or a model folder is, without loading any weights."""
    if not file.exists():
        raise LdmError(f"there is no {file}; give a model folder, a weights file or a picture")
    rows = (of_folder if file.is_dir() else of_file)(file, tensors, hashed)
    if as_json:
        print(json.dumps(rows))
        return
    width = max(map(len, rows))
    for name, value in rows.items():
        value = "not computed, for the file is large; add --hash" if value is None else value
        value = f"{value:,}" if isinstance(value, int) else value
        lines = lines_of(name, value) if isinstance(value, dict) else str(value).split("\n")
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<{width}}  {printable(line)}")


def lines_of(name: str, table: Mapping[str, Any]) -> list[str]:
    """A table as lines, each cut short; of a file's own metadata the first of them."""
    texts = [f"{key}: {value}".replace("\n", " ") for key, value in table.items()]
    shown = texts[:LISTED] if name == "metadata" else texts
    rest = [f"and {len(texts) - LISTED} more, which --json shows"] if len(shown) < len(texts) else []
    return [text if len(text) <= LONG else f"{text[:LONG]}..." for text in shown] + rest


def of_file(path: Path, tensors: bool, hashed: bool) -> Rows:
    """A file, by its first bytes and its name."""
    if not path.is_file():
        raise LdmError(f"{path} is neither a file nor a folder; give a model folder, a weights file or a picture")
    with path.open("rb") as file:
        start = file.read(9)
    pickled = path.suffix.lower() in PICKLES or start[:2] in (b"PK", b"\x80\x02")
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return of_weights(path, tensors, hashed)
    if pickled:
        convert = f"ldm convert {path.name} {path.stem}.safetensors --allow-pickle"
        said = "pickled file, which can run code when it is opened; it was not opened"
        return {"kind": said, "to convert": convert} | digest(path, hashed)
    return of_picture(path)


def of_weights(path: Path, tensors: bool, hashed: bool) -> Rows:
    """A safetensors file's kind and family, its numbers, and its own metadata."""
    from ldm.checkpoints.safe import read_header

    header = read_header(path)
    rows = recognised(header)
    if "LoRA" in rows["kind"]:
        rows |= of_adapter(path, header)
    rows |= {"tensors": len(header.tensors), "parameters": counted(header.tensors.values()).replace(" parameters", "")}
    rows |= digest(path, hashed)
    if licence := next((header.metadata[name] for name in LICENCES if name in header.metadata), ""):
        rows["licence"] = " ".join(licence.split())[:LONG]
    if header.metadata:
        rows["metadata"] = dict(sorted(header.metadata.items(), key=lambda item: ("." not in item[0], item[0])))
    return rows | ({"listing": listing(header)} if tensors else {})


def recognised(header: "Header") -> Rows:
    """Kind, family, task, prediction type, parts and telling shapes, from names, shapes and metadata."""
    from ldm.checkpoints.components import TASKS
    from ldm.checkpoints.families import FAMILIES, recognise
    from ldm.text.inversion import KINDS

    facts = recognise(header)
    rows: Rows = {"kind": facts.what}
    if facts.family:
        family = FAMILIES[facts.family]
        usual = f"{family.channels[facts.in_channels]} (usual in this family; the file does not say)"
        rows |= {
            "family": family.title,
            "task": TASKS[facts.in_channels - 4],
            "prediction type": facts.prediction or usual,
        }
        rows |= {"zero terminal SNR": "yes"} if facts.zero_snr else {}
        rows["parts"] = parts_of(header, {name: part.spellings for name, part in family.parts.items()})
    elif title := family_of(header):
        rows["family"] = title
    elif "embedding" in facts.what:
        sides = sorted(
            (entry.shape[-1], math.prod(entry.shape[:-1])) for entry in header.tensors.values() if entry.shape
        )
        rows["vectors"] = ", ".join(f"{count} of {width} numbers" for width, count in sides)
        rows |= {"family": KINDS[key]} if (key := tuple(width for width, _ in sides)) in KINDS else {}
    return rows | ({"shapes": shapes} if (shapes := shapes_of(header)) else {})


def parts_of(header: "Header", spellings: "Mapping[str, Iterable[Spelling]]") -> dict[str, str]:
    """What of a whole model's numbers each part has."""
    beginnings = {"EMA": ("model_ema.",)} | {
        name: tuple(spelling.prefix for spelling in found) for name, found in spellings.items()
    }
    parts: dict[str, list[Entry]] = {name: [] for name in (*spellings, "EMA", "other")}
    for name, entry in header.tensors.items():
        part = next((part for part, starts in beginnings.items() if name.startswith(starts)), "other")
        parts[part].append(entry)
    return {part: counted(entries) for part, entries in parts.items() if entries}


def family_of(header: "Header") -> str:
    """The family of models that something which is none is for; "" where nothing tells."""
    if family := WIDTHS.get(text_width(header) or 0):
        return family
    others = (name for mark, name in OTHERS if any(re.match(mark, each) for each in header.tensors))
    said = header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version")
    return next(others, f"{said[:LONG]} (its own word)" if said else "")


def shapes_of(header: "Header") -> dict[str, int]:
    """The sides that tell networks of a kind apart."""
    shapes = {
        label: entry.shape[side]
        for label, (mark, side) in SHAPES.items()
        for name, entry in header.tensors.items()
        if re.fullmatch(mark, name) and len(entry.shape) > side
    }
    width = text_width(header)
    return shapes | ({"width of the text": width} if width else {})


def text_width(header: "Header") -> int | None:
    """How wide the text is that its cross-attention, or what changes that, attends to; it tells the family."""
    tensors = header.tensors
    for name, entry in tensors.items():
        if not CONTEXT.fullmatch(name) or len(entry.shape) < 2:
            continue
        if ".lokr_w2_b" in name:  # a Kronecker product is as wide as its factors together
            left = tensors.get(name.replace("w2_b", "w1")) or tensors.get(name.replace("w2_b", "w1_b"))
            return entry.shape[1] * left.shape[1] if left and len(left.shape) > 1 else None
        return entry.shape[1]
    return None


def of_adapter(path: Path, header: "Header") -> Rows:
    """A LoRA's ranks and alphas, and how many layers of what it changes. Alphas are single numbers in the file."""
    from safetensors import safe_open

    from ldm.checkpoints.safe import read_json

    ranks = [entry.shape[0] for name, entry in header.tensors.items() if RANK.fullmatch(name) and entry.shape]
    scalars = [name for name, e in header.tensors.items() if name.endswith(".alpha") and math.prod(e.shape) == 1]
    with safe_open(path, framework="pt") as file:
        alphas = [float(file.get_tensor(name)) for name in scalars]
    config = path.parent / "adapter_config.json"  # of PEFT's folders; diffusers has it in the metadata, as JSON
    if not alphas and config.is_file():
        alphas = stated(read_json(config))
    elif not alphas:
        with suppress(ValueError, RecursionError):
            alphas = stated(json.loads(header.metadata.get("lora_adapter_metadata", "{}")))
    layers = {match[1] for name in header.tensors if (match := LAYER.fullmatch(name))}
    texts = sum(
        re.match(r"lora_te|(base_model\.model\.)?(text_encoder|te\d?[._])", layer) is not None for layer in layers
    )
    forms = {form for mark, form in VARIANTS.items() if any(mark in name for name in header.tensors)}
    names = next((whose for mark, whose in DIALECTS if any(re.match(mark, name) for name in header.tensors)), "unknown")
    rows: Rows = {"kind": f"a LoRA in {names} names"} | ({"form": ", ".join(sorted(forms))} if forms else {})
    rows |= {"rank": spread(ranks) or "unknown", "alpha": spread(alphas) or "not in the file, so that of the rank"}
    return rows | {"layers": f"{len(layers) - texts} of the denoiser, {texts} of text encoders"}


def stated(config: Any) -> list[float]:
    """The alphas in a configuration of PEFT, whose names diffusers gives a prefix."""
    items = config.items() if isinstance(config, dict) else ()
    return [float(value) for name, value in items if name.endswith("lora_alpha") and isinstance(value, int | float)]


def spread(values: "Iterable[float]") -> str:
    """ "8", or "4 to 64"."""
    ordered = [f"{value:g}" for value in sorted(set(values))]
    return " to ".join(dict.fromkeys((ordered[0], ordered[-1]))) if ordered else ""


def of_folder(folder: Path, tensors: bool, hashed: bool) -> Rows:
    """A model folder's parts with their parameters and types, its scheduler and defaults."""
    from ldm.checkpoints.folder import GENERATION, INDEX, SCHEDULER
    from ldm.checkpoints.safe import MANIFEST, read_json

    if not (folder / INDEX).is_file():
        [*files] = folder.glob("*.safetensors")
        if len(files) == 1:  # a part of a model, or an adapter
            return {"file": files[0].name} | of_weights(files[0], tensors, hashed)
        raise LdmError(f"{folder} is no model folder, for it has no {INDEX}; for a folder of pictures: ldm gallery")
    index = read_json(folder / INDEX)
    rows: Rows = {"kind": "model folder", "pipeline": str(index.get("_class_name", "unknown"))[:LONG]}
    config = read_json(folder / "unet/config.json") if (folder / "unet/config.json").is_file() else {}
    width, channels = config.get("cross_attention_dim"), config.get("in_channels")
    rows |= {"family": WIDTHS[width]} if isinstance(width, int) and width in WIDTHS else {}
    rows |= {"shapes": {"channels in": channels, "width of the text": width}} if config else {}
    found: dict[str, Header] = {}
    for name, words in index.items():
        if isinstance(words, list) and len(words) == 2 and all(isinstance(word, str) for word in words):
            rows |= of_part(folder, name, words[0], found)
    if (folder / SCHEDULER).is_file():
        config = read_json(folder / SCHEDULER)
        said = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing", "rescale_betas_zero_snr")
        rows["scheduler"] = {name: config[name] for name in said if name in config}
    if (folder / GENERATION).is_file():
        rows["defaults"] = read_json(folder / GENERATION)
    rows |= {"licence": licence} if (licence := card_licence(folder)) else {}
    rows |= {"manifest": f"compare with: ldm verify {folder}"} if (folder / MANIFEST).is_file() else {}
    listings = {f"{part}/{name}": text for part, header in found.items() for name, text in listing(header).items()}
    return rows | ({"listing": listings} if tensors else {})


def of_part(folder: Path, name: str, library: str, found: "dict[str, Header]") -> Rows:
    """One part of a model folder, if it is one with weights; `found` grows by its header."""
    from ldm.checkpoints.components import DIFFUSION, MODEL, NETWORKS
    from ldm.checkpoints.folder import find_weights
    from ldm.checkpoints.safe import Header, read_header

    if Path(name).name != name:
        raise LdmError(f"{folder} names a part {name!a:.40}, which is no folder in it; fetch it again")
    try:
        weights = find_weights(folder / name, DIFFUSION if library == "diffusers" else MODEL, None)
    except LdmError as error:  # only pickles, or shards that are missing
        return {name: str(error)}
    if weights is None:
        return {name: "missing"} if name in NETWORKS else {}
    files = weights[0]
    tensors = {key: value for path in files for key, value in read_header(path).tensors.items()}
    found[name] = Header(tensors, {})
    return {name: counted(tensors.values()) + f", {sum(path.stat().st_size for path in files):,} bytes"}


def card_licence(folder: Path) -> str:
    """What the front matter of a model card says of the licence; "" where nothing does."""
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace")[:10_000] if card.is_file() else ""
    match = re.match(r"---\n(?:.*\n)*?licen[sc]e: *(.+)\n(?:.*\n)*?---", text)
    return match[1].strip()[:LONG] if match else ""


def listing(header: "Header") -> dict[str, str]:
    """Every tensor with its type and shape."""
    return {
        name: f"{dtype_of(entry)} {'x'.join(map(str, entry.shape)) or 'one number'}"
        for name, entry in header.tensors.items()
    }


def dtype_of(entry: "Entry") -> str:
    """ "float16"."""
    return str(entry.dtype).removeprefix("torch.")


def counted(tensors: "Iterable[Entry]") -> str:
    """ "13,653,444 parameters in float16"."""
    kinds: Counter[str] = Counter()
    for entry in tensors:
        kinds[dtype_of(entry)] += math.prod(entry.shape)
    total = f"{sum(kinds.values()):,} parameters"
    if len(kinds) == 1:
        return f"{total} in {next(iter(kinds))}"
    return total + "".join(f", {count:,} in {kind}" for kind, count in kinds.items())


def digest(path: Path, hashed: bool) -> Rows:
    """A file's size and sha256, with A1111's short form of it; None for a large file, unless asked for."""
    size = path.stat().st_size
    if size > QUICK and not hashed:
        return {"bytes": size, "sha256": None}
    from ldm.checkpoints.safe import file_sha256

    found = file_sha256(path)
    return {"bytes": size, "sha256": found, "short hash": found[:10]}


def of_picture(path: Path) -> Rows:
    """A picture's size and recipe."""
    from PIL import Image

    from ldm.gallery import command_of, rows_of
    from ldm.images import read_text
    from ldm.recipe import read

    read_text(path)  # ModelError where it is no picture
    with Image.open(path) as image:
        rows: Rows = {"kind": f"{image.format} picture, {image.width}x{image.height}"}
    try:
        found = read(path)
    except LdmError as error:
        return rows | {"recipe": str(error)}
    rows["recipe of"] = found.source
    rows |= {label.lower(): value for label, value in rows_of(found.request, found.recipe)}
    rows |= {"note": "; ".join(found.notes)} if found.notes else {}
    return rows | {"command": command_of(found.request)}
