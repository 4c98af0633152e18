"""Tensors of safetensors files onto networks built on the meta device: mapped, not read, and cast one at a time."""

import math
import mmap
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints.safe import CODES, Entry, read_header
from ldm.errors import ModelError

Shape = tuple[int, ...]
ALIASES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
FIRST_NUMBERS = {"fill_", "zero_", "normal_", "uniform_"}
NAMED = 5  # how many keys of each kind an error names


class Bare(TorchFunctionMode):
    """Networks built `with Bare():` have parameters on the meta device, without numbers, and lose no time on their
    initialisation, which would be half of the time that building takes.
    """

    def __enter__(self) -> Self:
        self.opened = ExitStack()
        self.opened.enter_context(torch.device("meta"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *fault: object) -> None:
        super().__exit__(*fault)  # type: ignore[no-untyped-call]
        self.opened.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`func`, unless it fills a tensor with its first numbers: then that tensor as it is."""
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", None) in FIRST_NUMBERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


class Piece(NamedTuple):
    """Where the numbers of one of our keys lie.

    name, entry: the tensor in the file `path`, and what the header says of it. rows: of its first axis, None for all;
    transpose: of what is then a matrix.
    """

    path: Path
    name: str
    entry: Entry
    rows: range | None = None
    transpose: bool = False

    @property
    def shape(self) -> Shape:
        """The shape of the numbers as our network holds them, but for sides of 1 at the end."""
        shape = self.entry.shape if self.rows is None else (len(self.rows), *self.entry.shape[1:])
        return shape[::-1] if self.transpose else shape


class Wanted(NamedTuple):
    """A tensor to be loaded: what an error calls it, its shape in our network, where it lies (None: nowhere)."""

    label: str
    shape: Shape
    piece: Piece | None


def check(wanted: Iterable[Wanted], unexpected: Sequence[str], claim: str) -> None:
    """ModelError unless every wanted tensor is there, in its shape, of floating-point numbers, and nothing else is.

    A matrix may be stored as a 1x1 convolution and the other way round: the numbers are the same. claim: the beginning
    of the sentence ("x.safetensors does not fit its config.json").
    """
    rows = list(wanted)
    there = [(label, shape, piece) for label, shape, piece in rows if piece is not None]
    faults = {
        "missing": list(dict.fromkeys(label for label, _, piece in rows if piece is None)),
        "unexpected": unexpected,
        "of another shape": [f"{a} {piece.shape} for {b}" for a, b, piece in there if _plain(piece.shape) != _plain(b)],
        "without floating-point numbers": [
            f"{label} is {CODES[piece.entry.dtype]}"
            for label, _, piece in there
            if not piece.entry.dtype.is_floating_point
        ],
    }
    said = [f"{len(keys)} {what} ({listed(keys)})" for what, keys in faults.items() if keys]
    if said:
        raise ModelError(f"{claim}: {'; '.join(said)}; use weights made for it")


def _plain(shape: Shape) -> Shape:
    """A 1x1 convolution as the matrix it is."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are; also of the types of 8 bits, which torch itself cannot ask.

    The least and the greatest tell, NaN is both; 20 times as fast as to ask each.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    ends = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return all(math.isfinite(end) for end in torch.stack(ends.aminmax()).tolist())


def listed(items: Sequence[object]) -> str:
    """The first of them, for an error."""
    return ", ".join(map(str, items[:NAMED])) + (", ..." if len(items) > NAMED else "")


def load_pieces(
    model: nn.Module,
    pieces: Mapping[str, Piece],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Gives a model built on the meta device its tensors, from pieces that `check` has passed: one for each key.

    dtype None keeps the files'. What needs neither cast nor transfer stays mapped: it is read when it is first used,
    and writing to it never reaches the file. The rest is copied one tensor at a time and its part of the file let go
    at once, so that memory holds the weights and one tensor. ModelError when a file cannot be read any more.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for path in dict.fromkeys(piece.path for piece in pieces.values()):
        here = [(key, piece) for key, piece in pieces.items() if piece.path == path]
        try:
            with path.open("rb") as file:
                data = 8 + int.from_bytes(file.read(8), "little")
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for key, piece in sorted(here, key=lambda item: item[1].entry.start):
                state[key] = _taken(memory, data, piece, dtype, device).reshape(wanted[key])
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
    model.load_state_dict(state, assign=True)


def _taken(memory: mmap.mmap, data: int, piece: Piece, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    """The numbers of one piece, in their type and place; mapped where they are already."""
    entry, rows = piece.entry, piece.rows
    shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
    size, width = torch.Size(shape).numel() * entry.dtype.itemsize, entry.dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype or entry.dtype, device=device)
    skipped = 0 if rows is None else rows.start * (entry.end - entry.start) // entry.shape[0]
    start = data + entry.start + skipped
    mapped = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    numbers = mapped if start % width == 0 else mapped.clone()  # legal in the format, but no place for a number
    taken = numbers.view(entry.dtype).reshape(shape).to(device, dtype)
    taken = taken.T.contiguous() if piece.transpose else taken
    if taken.data_ptr() != mapped.data_ptr() and hasattr(mmap, "MADV_DONTNEED"):
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        memory.madvise(mmap.MADV_DONTNEED, page, start + size - page)
    return taken


def load_into(
    model: nn.Module,
    paths: str | Path | Sequence[Path],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    prefix: str = "",
) -> None:
    """Gives a model built on the meta device the tensors of one safetensors file, or of several (shards).

    Tensors are memory-mapped and cast one at a time, so the file is never in memory twice; dtype None keeps the file's.
    Spellings of old files are understood: CLIP keys without `text_model.`, the VAE's query / key / value / proj_attn
    (also as 1x1 convolutions); stray `embeddings.position_ids` are passed over. prefix: of the names in the file that
    are this model's; others are not looked at. Every header is validated and every key compared before anything is
    allocated. ModelError names missing, unexpected and misshapen keys; the model is then left as it was.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else list(paths)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found: dict[str, Piece] = {}
    unexpected = []
    for path in files:
        for name, entry in read_header(path).tensors.items():
            if not name.startswith(prefix):
                continue
            key = _our_key(name.removeprefix(prefix), wanted)
            if key in found:
                both = f"{name} and {found[key].name}"
                raise ModelError(f"{both} are the same weights twice in {listed(files)}; keep one")
            if key in wanted:
                found[key] = Piece(path, name, entry)
            elif not name.endswith("embeddings.position_ids"):
                unexpected.append(name)
    rows = (Wanted(key, shape, found.get(key)) for key, shape in wanted.items())
    check(rows, unexpected, f"{listed(files)} does not fit its config.json")
    load_pieces(model, found, dtype, device)


def _our_key(name: str, wanted: Mapping[str, object]) -> str:
    """Our spelling of a key; `name` itself where we have none."""
    renamed = OLD_ATTENTION.sub(lambda match: f"{match[1]}.{ALIASES[match[2]]}.{match[3]}", name)
    return next((key for key in (name, f"text_model.{name}", f"vision_model.{name}", renamed) if key in wanted), name)
