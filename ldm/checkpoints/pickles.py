"""Pickled checkpoints (.ckpt .pt .pth .bin) turned into safetensors in a process of their own.

A pickle is a program. This is the only file that may have one read, behind four walls: what the program names is looked
at first, without running it; it is read by torch's `weights_only` unpickler, which knows tensors and containers alone;
in a child process that has little memory and time and that ends itself when anything asks for a network, a process or
the ordinary unpickler; and what comes back is a safetensors file, which is validated like any other.
"""

import os
import pickletools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.safe import CODES, MAX_TENSORS, OLD_PICKLE, atomic_save_safetensors, foreign_kind, read_header
from ldm.errors import LdmError, ModelError

MAX_PROGRAM, MAX_NAMES = 16_000_000, 64  # bytes of the pickle itself, without the numbers; names that it asks for
MAX_PARTS, MAX_DEPTH = 4 * MAX_TENSORS, 4  # of the tables that hold the tensors
LARGER, ROOM = 4, 64_000_000  # what is written may be so much larger than the file (tied weights are written twice)
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # how a file of torch's form without a zip archive begins
INSTRUCTIONS = re.compile(  # those that torch's restricted unpickler knows
    r"PROTO|STOP|MARK|GLOBAL|NEWOBJ|REDUCE|BUILD|APPENDS?|SETITEMS?|TUPLE[123]?|NONE|NEWFALSE|NEWTRUE|BINFLOAT|LONG1"
    r"|EMPTY_(TUPLE|LIST|DICT|SET)|BININT[12]?|BINUNICODE|SHORT_BINSTRING|BINPERSID|(LONG_)?BIN(GET|PUT)"
)
TORCH = re.compile(  # names about which torch decides
    r"torch(\.\w+)+|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
BYSTANDERS = re.compile(  # what training tools leave beside the weights: `Nothing` stands in for it
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|argparse|pathlib|typing)(\.\w+)+"
    r"|collections\.defaultdict|builtins\.(dict|list|tuple|int|float|str|object)"
    r"|torch\.nn\.modules\.container\.ParameterDict"
)
OLD_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}  # of Python 2
WRAPPERS = ("state_dict", "string_to_param")  # where Lightning keeps the weights, and A1111 an embedding
BARRED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pickle.", "pty.")
CHILD = "import sys; sys.path.append(sys.argv.pop(1)); from ldm.checkpoints.pickles import _child; _child()"
KEPT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "LANG")
REFUSED = 3  # exit status of a child that printed why


class Nothing:
    """Stands for an object that is no weight: made of anything, does nothing, keeps the parameters it is told of."""

    def __init__(self, *_: object) -> None:
        self.inside: object = {}

    def __setstate__(self, state: object) -> None:
        self.inside = state.get("_parameters", {}) if isinstance(state, dict) else {}


def refuse_pickle(path: str | Path) -> ModelError:
    """The error for a pickled checkpoint where none is allowed; it says how to convert it."""
    path = Path(path)
    shown, name, stem = (text if text.isprintable() else ascii(text) for text in (str(path), path.name, path.stem))
    return ModelError(
        f"{shown} is a pickled checkpoint, which can run code when it is opened; convert it with "
        f"`ldm convert {name} {stem}.safetensors --allow-pickle` if you trust its source, or take safetensors"
    )


@contextmanager
def as_safetensors(path: str | Path) -> Iterator[Path]:
    """A temporary safetensors file with the tensors of a pickled checkpoint, for as long as the block lasts.

    What is a safetensors file already, whatever its name, is handed out itself. The tensors of "state_dict" (Lightning)
    or "string_to_param" (A1111's embeddings) stand without that word, nested tables with dots; what is no tensor is
    passed over. The file is made in the system's temporary folder (TMPDIR). ModelError: the file is of another kind or
    damaged, asks for more than tensors, or holds less than it claims; LdmError: there is no room.
    """
    path = Path(path)
    names = _look(path)
    if names is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ldm-", ignore_cleanup_errors=True) as folder:
        needed, free = path.stat().st_size + ROOM, shutil.disk_usage(folder).free
        if free < needed:
            said = f"converting {path} needs {needed:,} bytes in {folder} and {free:,} are free"
            raise LdmError(f"{said}; set TMPDIR to a folder with more room")
        target = Path(folder) / "model.safetensors"
        _convert(path, target, names)
        try:
            read_header(target)
        except ModelError as error:
            raise ModelError(str(error).replace(str(target), f"{path}, converted,")) from error
        yield target


def readable(path: str | Path, allow_pickle: bool) -> AbstractContextManager[Path]:
    """The file itself, or where that is allowed `as_safetensors` of it, for as long as the context lasts."""
    return as_safetensors(path) if allow_pickle else nullcontext(Path(path))


def _convert(path: Path, target: Path, names: list[str]) -> None:
    """Runs the child; ModelError with its sentence, or with what ended it."""
    here = str(Path(__file__).parents[2])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", CHILD, here, str(path.resolve()), str(target), *names],
            cwd=target.parent,
            env={name: os.environ[name] for name in KEPT if name in os.environ} | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300 + path.stat().st_size / 5e6,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{path} took more than {error.timeout:.0f} seconds to convert; take safetensors") from error
    if done.returncode == REFUSED:
        raise ModelError(f"{path} {done.stdout.decode(errors='replace').strip()}")
    if done.returncode or not target.is_file():
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise ModelError(f"{path} could not be converted, its process ended with {how}; take safetensors")


# -- looking, in this process -----------------------------------------------------------------------------------------


def _look(path: Path) -> list[str] | None:
    """The names that the pickle in a file asks for; None for a safetensors file. ModelError unless it can be weights.

    It only serves to refuse early and to say why: the walls behind it do not rely on it.
    """
    try:
        if not path.is_file():
            raise ModelError(f"cannot read {path}: it is missing or not a regular file")
        with path.open("rb") as file:
            start = file.read(512)
            size = os.fstat(file.fileno()).st_size
            if start[8:9] == b"{":
                return None
            if start[:4] == b"PK\x03\x04":
                return _names(path, _program(path, size), 1)
            if start[:1] != b"\x80" and not OLD_PICKLE.match(start):
                raise ModelError(f"{path} {foreign_kind(start, size)}")
            program = start + file.read(MAX_PROGRAM)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    is_torch = program.startswith(MAGIC)
    names = _names(path, program, 5 if is_torch else 1)  # magic number, version, system, the object, its storages
    if not is_torch:
        raise ModelError(f"{path} is a pickle of something else than a checkpoint of torch; take safetensors")
    return names


def _program(path: Path, size: int) -> bytes:
    """The pickle inside a zip archive of torch. ModelError for an archive that torch did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            names = [part.filename for part in parts]
            fault = ""
            if any(name.endswith("/constants.pkl") for name in names):
                fault = "is a TorchScript program, not a checkpoint"
            elif any(part.compress_type != zipfile.ZIP_STORED for part in parts) or len(set(names)) < len(names):
                fault = "is a zip archive with compressed or repeated parts, which torch never writes"
            elif len(parts) > 2 * MAX_TENSORS or sum(part.file_size for part in parts) > size:
                fault = "is a zip archive whose parts are too many, or larger than itself"
            programs = [part for part in parts if re.fullmatch(r"[^/]+/data\.pkl", part.filename)]
            if not fault and (len(programs) != 1 or programs[0].file_size > MAX_PROGRAM):
                fault = "is a zip archive without a checkpoint of torch in it"
            if fault:
                raise ModelError(f"{path} {fault}; take safetensors")
            return archive.read(programs[0])
    except (ValueError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is a damaged zip archive ({ascii(str(error))[:60]}); fetch it again") from error


def _names(path: Path, program: bytes, pickles: int) -> list[str]:
    """What these pickles, one behind the other, ask for, sorted. ModelError where that is more than tensors need."""
    names: set[str] = set()
    data = BytesIO(program)
    try:
        for _ in range(pickles):
            for instruction, argument, _ in pickletools.genops(data):
                if instruction.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")
                    name = OLD_NAMES.get(name, name)
                    if not TORCH.fullmatch(name) and not BYSTANDERS.fullmatch(name):
                        fault = f"asks for {name!a:.80}, which no weights need"
                        raise ModelError(f"{path} {fault}: it may be hostile; take safetensors")
                    names.add(name)
                if not INSTRUCTIONS.fullmatch(instruction.name):
                    fault = f"uses the pickle instruction {instruction.name}, which no weights need"
                    raise ModelError(f"{path} {fault}: it may be hostile; take safetensors")
    except (ValueError, IndexError, OverflowError, MemoryError, AttributeError) as error:
        raise ModelError(f"{path} is truncated or damaged: its pickle has no end; fetch it again") from error
    if len(names) > MAX_NAMES:
        raise ModelError(f"{path} asks for {len(names)} kinds of objects beside tensors; take safetensors")
    return sorted(names)


# -- reading, in the child --------------------------------------------------------------------------------------------


def _child() -> None:
    """Converts argv[1] to argv[2]; argv[3:] are the names that its pickle asks for. Prints why not, then exits."""
    source, target, *names = sys.argv[1:]
    torch.set_num_threads(1)
    _fence(os.path.getsize(source))
    try:
        atomic_save_safetensors(_extract(source, names), target)
    except LdmError as error:
        print(error)
        sys.exit(REFUSED)


def _extract(source: str, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a pickle; ModelError, without the file's name, says why there are none."""
    size = os.path.getsize(source)
    try:
        tensors = _tensors(_loaded(source, names))
    except LdmError:
        raise
    except Exception as error:  # whatever torch raises for a damaged file; its advice is not repeated
        text = "memory" if isinstance(error, MemoryError) else str(error)
        asked = re.search(r"GLOBAL (\S{1,80})", text)
        fault = f"cannot be read as plain tensors ({type(error).__name__})"
        fault = f"asks for {asked[1]!a}, which no weights need: it may be hostile" if asked else fault
        fault = "asks for more memory than weights of its size need" if "memory" in text else fault
        raise ModelError(f"{fault}; take safetensors") from error
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > LARGER * size + ROOM:
        raise ModelError(f"claims {total:,} bytes of tensors and has {size:,}; take safetensors")
    return tensors


def _fence(size: int) -> None:
    """Bounds this process, where the system can, to what a file of `size` bytes may need, and bars ways out of it."""
    sys.addaudithook(_bar)
    if sys.platform == "win32":
        return
    import resource

    written = LARGER * size + 2 * ROOM
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: 120 + size // 10**7, resource.RLIMIT_FSIZE: written}
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + 2 * size + 16 * ROOM
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _bar(event: str, _: object) -> None:
    if event.startswith(BARRED):
        raise PermissionError(f"{event} is barred here")


def _loaded(source: str, names: list[str]) -> object:
    """What the pickle describes, with `Nothing` for all that is neither a tensor nor a plain container."""
    stands_in = [(Nothing, name) for name in names if BYSTANDERS.fullmatch(name)]
    with torch.serialization.safe_globals(list(stands_in)):
        return torch.load(source, map_location="cpu", mmap=zipfile.is_zipfile(source), weights_only=True)


def _tensors(root: object) -> dict[str, Tensor]:
    """All tensors in nested tables, by name. ModelError: there are none, too many, or of a kind that no file holds."""
    for word in WRAPPERS:
        root = root[word] if isinstance(root, dict) and word in root else root
    found: dict[str, Tensor] = {}
    waiting, parts = [("", root, 0)], 0
    while waiting:
        name, part, depth = waiting.pop()
        part = part.inside if isinstance(part, Nothing) else part
        parts += 1
        if parts > MAX_PARTS or len(found) > MAX_TENSORS or name in found:
            raise ModelError(f"has more than {MAX_TENSORS:,} tensors, or two of one name; take safetensors")
        if isinstance(part, Tensor):
            found[name] = _plain(part, name)
        elif isinstance(part, dict) and depth < MAX_DEPTH:
            inner = [
                (f"{name}.{key}" if name else key, value, depth + 1) for key, value in part.items() if type(key) is str
            ]
            waiting += reversed(inner)
    if not found:
        raise ModelError("holds no tensors; take safetensors")
    return found


def _plain(tensor: Tensor, name: str) -> Tensor:
    """The tensor; ModelError unless a safetensors file can hold it and its numbers are there, each in its own place."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in CODES:
        raise ModelError(f"has {name!a:.80} of {tensor.dtype}, {tensor.layout}, which no weights are; take safetensors")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        there = tensor.untyped_storage().nbytes()
        raise ModelError(f"has {name!a:.80} of {tensor.nbytes:,} bytes with {there:,} in it; take safetensors")
    return tensor
