"""Model folders of the Hugging Face hub, through huggingface_hub alone: only the files that are opened, once.

Everything that library is told by its environment (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT) holds.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoints.safe import read_json
from ldm.checkpoints.shards import choose_file
from ldm.errors import LdmError, ModelError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
INDEX = "model_index.json"
DIFFUSERS = "diffusion_pytorch_model"  # the stem of weights of its classes; of all others:
OTHERS = {"safetensors": "model", "bin": "pytorch_model"}
ROOT = (  # what is fetched beside the components: of a fast mode (ldm.fast) all there is
    INDEX, "generation_config.json", "fast/generation_config.json", "fast/pytorch_lora_weights.safetensors",
    "fast/vae/config.json", f"fast/vae/{DIFFUSERS}.safetensors",
)  # fmt: skip
DESCRIBES = re.compile(r"[\w.\-]+\.(json|txt|model)", re.ASCII)  # configs, vocabularies, T5's spiece.model
UNUSED = ("image_encoder", "watermarker")  # components that are never opened; the first is large
WEIGHTLESS = re.compile(r"\w*(tokenizer|scheduler|feature_extractor|processor)\w*")
OFFLINE = "connect and run it once, or give a model folder"


def folder_of(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    allow_pickle: bool = False,
) -> Path:
    """The model folder called `name`: a folder here as it is, else the hub's `owner/name`, fetched into its cache.

    Of a hub model, configs, tokenizers and one set of weights for each component are fetched: safetensors of `variant`
    ("fp16"), else of the variant that is there; pickles only with `allow_pickle` and where there is nothing else.
    revision: branch, tag or commit; None: main. token: None takes HF_TOKEN or that of `hf auth login`.
    local_files_only (or HF_HUB_OFFLINE=1): only what is in the cache, which also serves when the hub cannot be reached.
    cache_dir: None takes HF_HUB_CACHE. ModelError: there is no such model or revision, it is gated, not in the cache,
    no model folder, or pickled; LdmError: the hub cannot be reached, or the files cannot be written.
    """
    if os.path.isdir(name):
        return Path(name)
    repo = str(name)
    if not NAME.fullmatch(repo) or os.path.exists(repo):
        raise ModelError(f"there is no model folder {repo!a:.200}, and a model of the hub is called owner/name")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise LdmError(f"opening {repo} needs huggingface_hub; install it, or give a model folder") from error

    def fetch(names: list[str], revision: str | None) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                cache_dir=cache_dir,
                allow_patterns=names,
            )
        )

    with _said_plainly(repo, revision):
        folder = fetch([INDEX], revision)  # named after its commit, which all else is fetched of
        if not (folder / INDEX).is_file():
            raise ModelError(f"{repo} is no model folder: it has no {INDEX}; fetch one of its files and give that")
        listed = None if local_files_only else _listing(HfApi(token=token), repo, folder.name)
        here = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        wanted = files_of(repo, read_json(folder / INDEX), here if listed is None else listed, variant, allow_pickle)
        return folder if set(wanted) <= set(here) else fetch(wanted, folder.name)


def _listing(api: "HfApi", repo: str, commit: str) -> list[str] | None:
    """The names of the files of a commit; None when the hub does not tell."""
    try:
        return [file.rfilename for file in api.model_info(repo, revision=commit).siblings or ()]
    except Exception:  # of several libraries: offline, unreachable, refused. What is in the cache must do
        return None


def files_of(
    repo: str, index: Mapping[str, object], names: Iterable[str], variant: str | None, allow_pickle: bool
) -> list[str]:
    """Which of a repository's files are opened: what describes each component of its model_index.json, and one set of
    weights. ModelError: a component has none, or only pickles and they are not allowed.
    """
    names, by_folder = list(names), dict[str, list[str]]()
    for name in names:
        folder, _, file = name.rpartition("/")
        by_folder.setdefault(folder, []).append(file)
    wanted = [name for name in ROOT if name in names]
    for component, entry in index.items():
        if not isinstance(entry, list) or entry[:1] in ([], [None]) or component.startswith("_") or component in UNUSED:
            continue
        files = by_folder.get(component, [])
        described = [file for file in files if DESCRIBES.fullmatch(file) and ".index." not in file]
        stems = dict.fromkeys(OTHERS, DIFFUSERS) if entry[0] == "diffusers" else OTHERS
        found = {kind: _weights(files, stem, variant, kind) for kind, stem in stems.items()}
        weights, pickled = ([], []) if WEIGHTLESS.fullmatch(component) else (found["safetensors"], found["bin"])
        pickled = [] if weights else pickled
        if pickled and not allow_pickle:
            said = f"{repo} has only pickled weights of its {component} ({pickled[0]}), which can run code when opened"
            raise ModelError(f"{said}; allow pickles (--allow-pickle) if you trust its source, or take another model")
        if not weights and not pickled and not WEIGHTLESS.fullmatch(component):
            said = f"{repo} has no weights of its {component!a:.60}"
            raise ModelError(f"{said}; take another model, or connect if only a part of it is in the cache")
        wanted += [f"{component}/{file}" for file in (*described, *weights, *pickled)]
    return wanted


def _weights(files: list[str], stem: str, variant: str | None, kind: str) -> list[str]:
    """The weights file of a component that is opened, or its index and shards."""
    found = choose_file(files, stem, variant, kind)
    if not found or not found[0].endswith(".json"):
        return [found[0]] if found else []
    infix = rf"\.{found[1]}" if found[1] else ""
    count = r"-\d{5}-of-\d{5}"
    shard = re.compile(rf"{stem}(?:{infix}{count}|{count}{infix})\.{kind}", re.ASCII)
    return [found[0], *(file for file in files if shard.fullmatch(file))]


@contextmanager
def _said_plainly(repo: str, revision: str | None) -> Iterator[None]:
    """One sentence for each way in which fetching fails."""
    from huggingface_hub import errors

    try:
        yield
    except LdmError:
        raise
    except errors.GatedRepoError as error:
        said = f"{repo} is gated; accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
        raise ModelError(said) from error
    except errors.RepositoryNotFoundError as error:
        said = f"the hub has no model {repo}, or it is private; check the name, or set HF_TOKEN"
        raise ModelError(said) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!a:.80}; leave it out, or choose another") from error
    except errors.LocalEntryNotFoundError as error:
        told = error.__cause__ is None or isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        if told:
            raise ModelError(f"{repo} is not in the cache of the hub, and it works offline; {OFFLINE}") from error
        raise LdmError(f"{repo} is not in the cache, and the hub cannot be reached; {OFFLINE}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        raise LdmError(f"the hub answered {status} when asked for {repo}; try again later") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo!a:.200} is no name of a hub model; it is called owner/name") from error
    except OSError as error:
        said = f"cannot fetch {repo} ({error.strerror or type(error).__name__})"
        raise LdmError(f"{said}; check the connection, and the room in the cache") from error
