"""What other tools write into their pictures <-> fields of Request: A1111's "parameters" text and ComfyUI's graph.

A1111's form (its modules/infotext_utils.py and processing.py): the prompt, on one line or more; a line that begins with
"Negative prompt:" and its following lines, if there is one; and a last line of three or more "Key: value" pairs.
Nothing here imports torch.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.errors import ModelError, UsageError
from ldm.foreign import DIGITS, brief, json_object
from ldm.names import GRIDS, SAMPLERS, Sampler
from ldm.request import Request

SCHEDULES = {name.lower(): own for own, label in GRIDS.items() for name in (own, label)}
TIMED = ("ddim", "plms")  # A1111's samplers that heed no schedule type
COMFY = {row.comfy: own for own, row in SAMPLERS.items() if row.comfy} | {"ddim": "euler"}
RNG = {"cpu": "CPU", "gpu": "NV"}  # NV: a GPU's numbers without one; absent, A1111's default, is the GPU itself
BRACKETS = re.compile(r"[()\[\]]")  # with which A1111 writes weights and schedules

ORDER = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Variation seed",
         "Variation seed strength", "Denoising strength", "Clip skip", "ENSD", "RNG", "Inpaint area",
         "Masked area padding", "Emphasis", "Eta", "Eta DDIM", "Lora hashes", "Profile", "Version")  # fmt: skip
FEWEST_KEYS = 3  # in the last line, for it to count
# A1111's `\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)`, which takes the square of the length where words
# have no colon after them. This takes such words too, without a value, and so never goes back.
PAIR = re.compile(r'(\w[\w \-/]+)(?::\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$))?')
SIZE = re.compile(r"(\d+)x(\d+)", re.ASCII)
NETWORK = re.compile(r"<hypernet:[^<>]{1,200}>")
ADAPTER = re.compile(r"<(?:lora|lyco):([^:<>]{1,200})[^<>]{0,1000}>")
CARRIED = {  # A1111's number -> field; of the others ORDER tells which are understood
    "Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size-1": "width", "Eta": "eta",
    "Size-2": "height", "Clip skip": "clip_skip", "Variation seed": "variation_seed", "ENSD": "eta_noise_seed_delta",
    "Variation seed strength": "variation_strength", "Eta DDIM": "eta", "Skip Early CFG": "guidance_start",
}  # fmt: skip
FLOATS = ("guidance_scale", "guidance_start", "variation_strength", "eta")
MOST_NODES = 64  # of a graph that are gone through to find one thing
MOST_INPUTS = 200  # of a node; one with more is none of a person's
MOST_NAMED = 8  # keys or nodes that a note names


def write(fields: Mapping[str, Any], extra: Mapping[str, str]) -> str:
    """The "parameters" text of one picture, in A1111's form and order of keys.

    fields: those of Request for this picture; None, and what A1111 has no key for, is left out. extra: further keys and
    values ("Model hash", "Model", "Version"); unknown ones come before "Version". Ours alone is "Profile".
    UsageError: under three keys, which no reader would take for parameters.
    """
    name, profile = fields.get("scheduler") or "", fields.get("profile")
    sampler = SAMPLERS.get(name, Sampler(name, exact=False))
    varied, skipped = fields.get("variation_strength"), fields.get("clip_skip")
    size, padding = (fields.get("width"), fields.get("height")), fields.get("padding_mask_crop")
    prompt, negative = fields.get("prompt") or "", fields.get("negative_prompt") or ""
    plain = (fields.get("literal") or profile == "diffusers") and BRACKETS.search(prompt + negative)
    level = None if skipped is None else skipped + (profile == "diffusers")  # A1111 counts the last layer as 1
    late = int((fields.get("guidance_start") or 0) * (fields.get("num_inference_steps") or 0))  # guidance, in steps
    pairs = {
        "Steps": fields.get("num_inference_steps"),
        "Sampler": sampler.a1111,
        "Schedule type": GRIDS.get(
            fields.get("schedule_type") or "", "Uniform" if sampler.exact and name not in TIMED else None
        ),
        "CFG scale": fields.get("guidance_scale"),
        "Seed": fields.get("seed"),
        "Size": "{}x{}".format(*size) if all(size) else None,
        "Variation seed": fields.get("variation_seed") if varied else None,
        "Variation seed strength": varied or None,
        "Denoising strength": None if fields.get("image") is None else fields.get("strength"),
        "Clip skip": level if level and level > 1 else None,
        "Skip Early CFG": (late - 0.5) / fields["num_inference_steps"] if late else None,
        "ENSD": fields.get("eta_noise_seed_delta") or None,
        "RNG": RNG.get(fields.get("noise_source") or ""),
        "Inpaint area": None if padding is None else "Only masked",
        "Masked area padding": padding,
        "Emphasis": "None" if plain else None,
        "Eta DDIM" if name == "ddim" else "Eta": fields.get("eta"),
        "Profile": profile,
    } | dict(extra)
    places = {key: ORDER.index(key) if key in ORDER else len(ORDER) - 1.5 for key in pairs}
    said = [f"{key}: {_quoted(pairs[key])}" for key in sorted(pairs, key=places.__getitem__) if _shown(pairs[key])]
    if len(said) < FEWEST_KEYS:
        raise UsageError(f"parameters of {len(said)} keys; give steps, seed and size at least")
    lines = [prompt, f"Negative prompt: {negative}" if negative else "", ", ".join(said)]
    return "\n".join(line for line in lines if line)


def _shown(value: Any) -> str:
    """A value as A1111 shows it: whole numbers without a point, nothing for None."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _quoted(value: Any) -> str:
    text = _shown(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


def parse(text: str) -> dict[str, str]:
    """A1111's reading of a "parameters" text: "Prompt", "Negative prompt" and the keys of the last line, where that is
    one; a value WxH becomes Key-1 and Key-2. Any text can be read.
    """
    *lines, last = text.strip().split("\n")
    pairs = [(m[1], m[2]) for m in PAIR.finditer(last) if m[2] is not None]
    if len(pairs) < FEWEST_KEYS:
        lines, pairs = [*lines, last], []
    lines = [line.strip() for line in lines]
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = [line.removeprefix("Negative prompt:").strip() for line in lines[at:]]
    found = {"Prompt": "\n".join(lines[:at]).lstrip("\n"), "Negative prompt": "\n".join(negative).lstrip("\n")}
    for key, value in pairs:
        value = _unquoted(value)
        if match := SIZE.fullmatch(value):
            found |= {f"{key}-1": match[1], f"{key}-2": match[2]}
        elif value:
            found[key] = value
    return found


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def request_fields(text: str) -> tuple[dict[str, Any], list[str]]:
    """A1111's text -> fields of Request, each valid by itself, and notes: a sentence for what was not carried over.

    What another tool than ldm wrote is drawn in the profile "a1111".
    """
    found, fields, notes = parse(text), dict[str, Any](), list[str]()
    ours = found.get("Version", "").startswith("ldm")
    profile = found.get("Profile") if ours else "a1111"
    if found["Prompt"]:
        fields["prompt"] = found["Prompt"]
    fields["negative_prompt"] = found["Negative prompt"]
    for key, name in CARRIED.items():
        if key in found:
            fields[name] = _number(found[key], name in FLOATS)
            if fields[name] is None:
                notes.append(f"{key} is {brief(found[key])}, which is no number; it was left out")
    if profile == "diffusers" and fields.get("clip_skip") is not None:
        fields["clip_skip"] -= 1
    if 0 < (early := fields.get("guidance_start") or 0) <= 1 and (steps := fields.get("num_inference_steps")):
        fields["guidance_start"] = (int(early * steps + 1e-6) + 1.5) / steps  # A1111 skips each step k / steps <= it
    if not fields.get("variation_strength"):
        fields = {name: value for name, value in fields.items() if not name.startswith("variation_")}
    if len(found) > 2:
        from_cpu = found.get("RNG") == "CPU" or found.get("Version") == "ComfyUI"  # so its nodes that write this text
        fields |= {"profile": profile, "noise_source": "cpu" if from_cpu else "gpu"}
    if "Sampler" in found:
        notes += _sampler(fields, found, ours)
    notes += _emphasis(fields, found.get("Emphasis", "Original"))
    notes += _model_note(found.get("Model"), found.get("Model hash"))
    if ours:
        notes.append("ldm drew it, but its own recipe is lost; what the text of A1111 does not hold was left out")
    elif "variation_strength" in fields:
        notes.append("A1111 turns the noise of variations column by column, here it is turned as a whole")
    known = {"Prompt", "Negative prompt", *ORDER, *CARRIED}
    if any(key.startswith("Hires") for key in found):  # of its second pass, from its own picture
        known.remove("Denoising strength")
    elif "Denoising strength" in found:
        said = {"--strength": found["Denoising strength"], "--only-masked": found.get("Masked area padding")}
        notes.append(_picture_note(said))
    if lost := [key for key in found if key not in known or (key == "Profile" and not ours)]:
        notes.append(f"not carried over: {_listed(lost)}")
    notes += _network_notes(found["Prompt"], found.get("Lora hashes", ""))
    return _valid(fields, notes), notes


def _sampler(fields: dict[str, Any], found: Mapping[str, str], ours: bool) -> Iterator[str]:
    """Sets "scheduler" and "schedule_type" of A1111's "Sampler" and "Schedule type"; yields notes.

    Before A1111 1.9 the sampler's name ended with the schedule ("DPM++ 2M Karras"), or meant k-diffusion's own.
    """
    name, kind = found["Sampler"].strip().lower(), found.get("Schedule type", "").strip().lower()
    names = {known.lower(): own for own, row in SAMPLERS.items() for known in (row.comfy, own, row.a1111) if known}
    if name not in names and (ended := re.fullmatch(r"(.+)[ _](karras|exponential)", name)):
        name, kind = ended.groups()
    own = names.get(name)
    if own is None:
        yield f"the sampler {brief(found['Sampler'])} is not known here; the model's own scheduler stands in"
    else:
        fields["scheduler"] = own
        row = SAMPLERS[own]
        if not row.exact and not ours:
            yield f"{row.a1111} runs here as in diffusers, not as in A1111"
        if own not in TIMED and (row.exact or ours):
            kind = kind or ("automatic" if ours else "uniform")
            plain = ours and fields.get("profile") != "a1111"  # then "Uniform" stands for the model's own levels
            fields["schedule_type"] = None if plain and kind == "uniform" else SCHEDULES.get(kind)
            if kind not in ("automatic", *SCHEDULES):
                yield f"the schedule {brief(kind)} is not known here; the usual one of {own} stands in"
    if "eta" in fields and not (own and SAMPLERS[own].eta):
        yield f"Eta {fields.pop('eta')} was left out, for {own or 'that sampler'} has none here"


def _emphasis(fields: dict[str, Any], said: str) -> list[str]:
    """Sets "literal" where A1111's "Emphasis" read no weights; a note on its other ways to weigh."""
    if said == "None" and fields.get("profile") != "diffusers":
        fields["literal"] = True
    known = said in ("Original", "None")
    return [] if known else [f"words are weighted here by the emphasis Original, not {brief(said)}"]


def comfy_fields(prompt_json: str) -> tuple[dict[str, Any], list[str]]:
    """ComfyUI's API graph (the text "prompt" of its pictures) -> fields of Request and notes, as `request_fields`.

    The sampler read is a KSampler or KSamplerAdvanced, the first whose latents begin empty. ModelError: no JSON object
    of nodes, too large, or no such sampler.
    """
    graph = {
        key: node
        for key, node in json_object(prompt_json, "the graph of ComfyUI", lenient=True).items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict) and len(node["inputs"]) <= MOST_INPUTS
    }
    samplers = [node["inputs"] for node in graph.values() if node.get("class_type") in ("KSampler", "KSamplerAdvanced")]
    if not samplers:
        raise ModelError("the graph of ComfyUI has no KSampler, and no other sampler is read")
    begun = [(inputs, _latent(graph, inputs)) for inputs in samplers[:MOST_NODES]]
    inputs, latent = next(((inputs, latent) for inputs, latent in begun if latent is not None), begun[0])
    notes, fields, denoise = list[str](), dict[str, Any](), _value(graph, inputs.get("denoise", 1))
    if len(samplers) > 1:
        notes.append(f"the graph has {len(samplers)} samplers; the first of them was read")
    for name, keys in {
        "num_inference_steps": ("steps",), "guidance_scale": ("cfg",), "seed": ("seed", "noise_seed")
    }.items():  # fmt: skip
        value = next((_value(graph, inputs[key]) for key in keys if key in inputs), None)
        if isinstance(value, int | float):
            fields[name] = value
    if latent is None:
        notes.append(_picture_note({"--strength": None if denoise == 1 else denoise}))
    else:
        fields |= {name: _value(graph, latent.get(name)) for name in ("width", "height")}
        if latent.get("batch_size", 1) != 1:
            notes.append("it is one of a batch drawn from one seed; only the first of them has this seed's noise")
    names = [_value(graph, inputs.get(name)) for name in ("sampler_name", "scheduler")]
    notes += _comfy_sampler(fields, *(name if isinstance(name, str) else "" for name in names))
    for field, key in (("prompt", "positive"), ("negative_prompt", "negative")):
        fields[field], skipped = _conditioning(graph, inputs.get(key), key)
        if field == "prompt":
            fields["clip_skip"] = skipped
    if (latent is not None and denoise != 1) or inputs.get("add_noise", "enable") != "enable":
        notes.append("its latents did not begin as noise alone, which was not carried over")
    notes += _comfy_words(fields) + _comfy_model(graph, inputs) + _network_notes(fields["prompt"] or "")
    return _valid({name: value for name, value in fields.items() if value is not None}, notes), notes


def _number(text: str, real: bool) -> float | int | None:
    """The number that a text is; None when it is none, or absurdly long."""
    try:
        return None if len(text) > DIGITS + 5 else float(text) if real else int(text)
    except ValueError:
        return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(brief(name)[1:-1] for name in names[:MOST_NAMED]) + more


def _model_note(name: str | None, digest: str | None) -> list[str]:
    if not name and not digest:
        return []
    return [f"it was made with the model {brief(name or 'unnamed')}" + (f", hash {brief(digest)}" if digest else "")]


def _picture_note(said: Mapping[str, Any]) -> str:
    """What is to be given where a picture was made from another. said: option -> what it was; numbers are passed on."""
    numbers = {option: _number(str(value), True) for option, value in said.items()}
    options = ["--image", *(f"{option} {_shown(n)}" for option, n in numbers.items() if n is not None)]
    return f"it was made from another picture, which is not in it; give it with {' and '.join(options)}"


def _network_notes(prompt: str, hashes: str = "") -> list[str]:
    """Notes on the adapters that a prompt names, which stay in it, and on other networks. hashes: A1111's "Lora
    hashes", "name: hash, name: hash".
    """
    known = dict.fromkeys((name.strip().replace(",", "") for name in ADAPTER.findall(prompt)), "")
    known |= {name.strip(): digest.strip() for name, _, digest in (pair.rpartition(":") for pair in hashes.split(","))}
    known.pop("", None)
    shown = [f"{name} (hash {digest})" if digest else name for name, digest in known.items()]
    adapters = f"it was made with the adapters {_listed(shown)}; give their files with --lora or their --lora-dir"
    found = NETWORK.findall(prompt)
    others = f"the prompt calls for networks that are not loaded: {_listed(found)}"
    return [adapters] * bool(shown) + [others] * bool(found)


def _valid(fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The fields that Request takes. Of the others a note says why they were left out."""
    kept: dict[str, Any] = {}
    pair = {"variation_strength": fields.get("variation_strength")} if "variation_strength" in fields else {}
    for name, value in fields.items():
        try:
            if value is not None:
                tried: dict[str, Any] = {"prompt": "words"} | (pair if name == "variation_seed" else {})
                Request(**tried | {name: value})
                kept[name] = value
        except UsageError as error:
            notes.append(f"{str(error)[:200]}; it was left out")
    return kept


def _nodes(graph: Mapping[str, Any], link: Any, through: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The node a link [node, output] leads to, then on along the first of the inputs `through` that is a link, or the
    only link there is. Ends at a circle, and after MOST_NODES.
    """
    seen: set[str] = set()
    while isinstance(link, list) and len(link) == 2 and isinstance(link[0], str) and len(seen) < MOST_NODES:
        node = graph.get(link[0])
        if node is None or link[0] in seen:
            return
        seen.add(link[0])
        yield node
        links = {key: value for key, value in node["inputs"].items() if isinstance(value, list)}
        only = next(iter(links.values())) if len(links) == 1 else None
        link = next((links[key] for key in through if key in links), only)


def _value(graph: Mapping[str, Any], value: Any) -> Any:
    """A number or text, or that of the primitive node a link leads to; None when there is none."""
    for node in _nodes(graph, value, ()) if isinstance(value, list) else ():
        plain = (node["inputs"].get(key) for key in ("value", "text", "string", "seed", "noise_seed", "int", "float"))
        if (found := next((v for v in plain if isinstance(v, str | int | float)), None)) is not None:
            return found
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _latent(graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inputs of the node of empty latents that a sampler begins from; None when there is none."""
    for node in _nodes(graph, inputs.get("latent_image"), ("samples", "latent")):
        if str(node.get("class_type")).startswith("Empty") and {"width", "height"} <= node["inputs"].keys():
            return dict(node["inputs"])
        if "denoise" in node["inputs"]:  # another sampler: it does not begin here
            return None
    return None


def _conditioning(graph: Mapping[str, Any], link: Any, side: str) -> tuple[str | None, int | None]:
    """The text that a sampler's "positive" or "negative" comes from, and which layer of its encoder, from the last."""
    through = ("conditioning", "conditioning_1", "conditioning_to", side)
    for node in _nodes(graph, link, through):
        if node.get("class_type") == "ConditioningZeroOut":
            return "", None
        for key in ("text", "text_g", "text_l"):
            if isinstance(text := _value(graph, node["inputs"].get(key)), str):
                for encoder in _nodes(graph, node["inputs"].get("clip"), ("clip",)):
                    last = encoder["inputs"].get("stop_at_clip_layer")  # -1 is the last one
                    if isinstance(last, int) and last < 0:
                        return text, -last
                return text, None
    return None, None


def _comfy_sampler(fields: dict[str, Any], sampler: str, schedule: str) -> Iterator[str]:
    """Sets how ComfyUI's picture is sampled, from its sampler_name and scheduler; yields what is not as there."""
    fields |= {"profile": "a1111", "noise_source": "cpu", "schedule_type": SCHEDULES.get(schedule)}
    name = sampler.removesuffix("_gpu")
    if name not in COMFY:
        yield f"the sampler {brief(sampler)} is not known here; the model's own scheduler stands in"
        return
    fields["scheduler"] = own = COMFY[name]
    if not SAMPLERS[own].exact:
        fields["schedule_type"] = None if own == "lcm" else fields["schedule_type"]
        yield f"{name} runs here as in diffusers, not as in ComfyUI"
    if SAMPLERS[own].noise and ("sde" not in name or name != sampler):
        yield f"the fresh noise of {sampler} is the graphics card's there, so the picture is another here"
    if name == "dpmpp_3m_sde" or schedule in ("beta", "kl_optimal"):
        yield f"the noise levels of {name} with {schedule} are others there"
    if schedule not in SCHEDULES:
        yield f"the schedule {brief(schedule)} is not known here; the usual one of {own} stands in"
    yield "ComfyUI begins with a trace more noise and rounds timesteps, so the picture is a little different here"


def _comfy_words(fields: dict[str, Any]) -> list[str]:
    """Sets "literal" where ComfyUI takes for text what here is none; a note where it weighs words otherwise."""
    words = "\n".join(fields[name] or "" for name in ("prompt", "negative_prompt"))
    if re.search(r"(?<!\\)\(", words):
        return ["ComfyUI weighs words in brackets otherwise (towards the empty prompt), and has no [schedules] and AND"]
    if re.search(r"[\[\]]|\bAND\b|\bBREAK\b", words) and "\\" not in words:
        fields["literal"] = True
    return []


def _comfy_model(graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """Notes on the model, and on what stands between it and the sampler."""
    told, passed = list[str](), list[str]()
    for node in _nodes(graph, inputs.get("model"), ("model",)):
        name = node["inputs"].get("ckpt_name", node["inputs"].get("unet_name"))
        if isinstance(name, str):
            told = _model_note(name, None)
            break
        passed.append(str(node.get("class_type")))
    return told + ([f"not carried over: {_listed(passed)}"] if passed else [])
