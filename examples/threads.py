"""One pipeline in eight threads at once: the pictures are those drawn one after another.

    python examples/threads.py out/threads

A request leaves nothing behind in the pipeline, so a server needs one copy of the model and no lock.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

import ldm

THREADS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the same requests in both ways and compare."""
    parser = argparse.ArgumentParser(description="Draw with one pipeline from several threads.")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args(arguments)

    pipeline = ldm.Pipeline.from_pretrained()
    objects = ("an owl", "a pizza", "a taco", "a banana")
    requests = [
        ldm.Request(f"{objects[i % 4]} on a blue background", seed=i, num_inference_steps=chosen.steps)
        for i in range(THREADS)
    ]

    def draw(request: ldm.Request) -> Image.Image:
        return pipeline(request).images[0]

    begun = time.perf_counter()
    serial = [draw(request) for request in requests]
    middle = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        threaded = list(pool.map(draw, requests))
    ended = time.perf_counter()

    chosen.out.mkdir(parents=True, exist_ok=True)
    for request, image in zip(requests, threaded, strict=True):
        image.save(chosen.out / f"{request.seed}.png")
    same = sum(a.tobytes() == b.tobytes() for a, b in zip(serial, threaded, strict=True))
    print(f"one after another {middle - begun:.2f} s, in {THREADS} threads {ended - middle:.2f} s")
    print(f"{same} of {THREADS} pictures are equal in every pixel")


if __name__ == "__main__":
    main()
