"""Draw a long list of requests, one JSON object a line, and go on after an interruption where it stopped.

    python examples/batch_from_jsonl.py out/batch --jobs jobs.jsonl

A line holds fields of Request or short names of their options: {"prompt": "an owl", "seed": 7, "steps": 12, "n": 2}.
Without --jobs a few lines of its own are drawn. `index.jsonl` in the folder says what was drawn from what.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import ldm
from ldm.images import save
from ldm.prompts import read_prompts
from ldm.recipe import digests, fields_of, recipe_of, texts

JOBS = """
{"prompt": "an owl on a yellow background", "seed": 7}
{"prompt": "a pizza on a blue background", "seed": 7, "steps": 10, "scheduler": "dpm++2m"}
{"prompt": "a taco on a red background", "seed": 1, "n": 2, "guidance": 2}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw what is not there yet, and list it."""
    parser = argparse.ArgumentParser(description="Draw requests from a file of JSON lines.")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--jobs", type=Path, help="file of JSON lines; absent = three of its own")
    chosen = parser.parse_args(arguments)

    text, where = (chosen.jobs.read_text("utf-8"), str(chosen.jobs)) if chosen.jobs else (JOBS, "JOBS")
    jobs = [ldm.Request(**fields) for fields in read_prompts(text.splitlines(), "jsonl", where)]  # all are checked
    pipeline = ldm.Pipeline.from_pretrained()
    hashes = digests(pipeline)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs):
        if (chosen.out / f"{number:05}-0.png").exists():  # the last picture of a job to be written is its first
            continue
        result = pipeline(job)
        singles = list(result.request.singles())
        for k in reversed(range(len(singles))):
            path = chosen.out / f"{number:05}-{k}.png"
            save(result.images[k], path, texts(recipe_of(pipeline, singles[k], hashes)))
            with (chosen.out / "index.jsonl").open("a", encoding="utf-8") as index:
                index.write(json.dumps({"path": path.name, **fields_of(singles[k])}) + "\n")
        print(f"{number + 1} of {len(jobs)}: {len(singles)} of {job.prompt!r}")


if __name__ == "__main__":
    main()
