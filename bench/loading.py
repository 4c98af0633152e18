"""How long and how much memory opening a model takes, beside diffusers, in processes of their own and by turns.

    python bench/loading.py                 # Stable Diffusion 1.5 of random weights, files of float16 and of float32
    python bench/loading.py --rounds 7

Files are read once before, so that both find them in the system's cache. "whole": from the start of the process until
the model is open; "load": the opening alone, after the imports; "peak": the most memory the process had, and what of it
was its own (mapped files are given back when memory is wanted).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

OURS = """
import json, resource, time
from ldm.pipeline import Pipeline
begun = time.perf_counter()
pipe = Pipeline.from_pretrained({path!r}, device="cpu", dtype={dtype!r})
"""
THEIRS = """
import json, resource, time
import torch
from diffusers import StableDiffusionPipeline
begun = time.perf_counter()
pipe = StableDiffusionPipeline.from_pretrained({path!r}, dtype=torch.{long}, use_safetensors=True)
"""
SINGLE = """
import json, resource, time
from ldm.pipeline import Pipeline
begun = time.perf_counter()
pipe = Pipeline.from_single_file({path!r}, device="cpu", dtype={dtype!r})
"""
END = """
load = time.perf_counter() - begun
rows = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "RssAnon")))
print(json.dumps({"load": load} | {name: int(text.split()[0]) / 1024 for name, text in rows.items()}))
"""
LONG = {"fp16": "float16", "fp32": "float32"}


def make(place: Path, dtype: str) -> None:
    """A folder and a single file of SD 1.5's sizes with random weights."""
    import torch

    from ldm.checkpoints.components import Components
    from ldm.checkpoints.families import FAMILIES
    from ldm.checkpoints.folder import save_folder
    from ldm.checkpoints.single_file import save_single_file
    from ldm.models.clip import CLIPTextModel
    from ldm.models.unet import UNet
    from ldm.models.vae import AutoencoderKL
    from ldm.text.tokenizer import CLIPTokenizer

    family = FAMILIES["sd1"]
    parts = {name: part.config for name, part in family.parts.items()}
    config = family.scheduler_config(4, "epsilon")
    made = Components(
        UNet(parts["unet"]), AutoencoderKL(parts["vae"]), CLIPTextModel(parts["text_encoder"]),
        CLIPTokenizer.standard(), config,
    )  # fmt: skip
    kind = getattr(torch, LONG[dtype])
    save_folder(made, place / "folder", kind)
    save_single_file(made, place / "single.safetensors", kind)


def measured(script: str) -> dict[str, float]:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script + END], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - begun
    return {"whole": whole, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--place", type=Path, default=Path("out/bench"), help="where the models lie, 8 GB; made if absent"
    )
    asked = parser.parse_args()
    for dtype in LONG:
        place = asked.place / dtype
        if not (place / "single.safetensors").is_file():
            place.mkdir(parents=True, exist_ok=True)
            call = f"import loading; loading.make(loading.Path({str(place.resolve())!r}), {dtype!r})"
            subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, check=True)
        for file in place.rglob("*.safetensors"):
            with file.open("rb") as handle:
                while handle.read(1 << 24):
                    pass
        said = {"path": str(place / "folder"), "dtype": dtype, "long": LONG[dtype]}
        single = said | {"path": str(place / "single.safetensors")}
        scripts = {
            "ldm, folder": OURS.format(**said), "diffusers, folder": THEIRS.format(**said),
            "ldm, single file": SINGLE.format(**single),
        }  # fmt: skip
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in scripts}
        for _ in range(asked.rounds):
            for name, script in scripts.items():
                rows[name].append(measured(script))
        weights = sum(file.stat().st_size for file in (place / "folder").rglob("*.safetensors")) / 2**20
        print(f"{dtype}: {weights:,.0f} MiB of weights; medians of {asked.rounds}")
        for name, found in rows.items():
            middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
            print(
                f"  {name:<18} whole {middle['whole']:5.2f} s   load {middle['load']:5.2f} s   "
                f"peak {middle['VmHWM']:6,.0f} MiB, its own {middle['RssAnon']:6,.0f} MiB"
            )


if __name__ == "__main__":
    main()
