"""Do the everyday tests notice when the mathematics is wrong? Small faults, put in one at a time, and who sees them.

    python bench/mutants.py                       # every fault, one after the other; JSON lines in build/mutants.jsonl
    python bench/mutants.py --resume              # go on; survivors are judged again if the tests have changed
    python bench/mutants.py --limit 100 --only dpm_solver --jobs 2
    python bench/mutants.py --list                # name the faults, run nothing

A mutant is one change of one file of SOURCES: a sign, an index, a coefficient, an order, a function, a dropped term. It
is killed when a test fails, or hangs; a survivor is a line no everyday test would miss. Everything runs in a copy of
the tree. The tests are first run as they are, once for their times and once for the lines each of them reaches. Then
every mutant gets a process forked from one that has the libraries loaded, which runs the tests that can see it, those
that reach the line and are quick first, and stops at the first failure. No use where there is no fork (Windows).
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "ldm/schedulers/*.py",
    *(f"ldm/diffusion/{name}.py" for name in ("spacing", "grids", "prediction", "schedule", "guidance")),
)
TESTS = (  # those that exist are run; of each only what is not marked slow
    "test_levels.py",
    "test_solver_state.py",
    "test_guidance.py",
    "test_solver_laws.py",
    "test_solver_noise.py",
    "test_solvers.py",
    "test_schedulers.py",
    "test_diffusion.py",
    "test_grids.py",
    "test_spacing.py",
    "test_noise.py",
    "test_configs.py",
    "test_sampling.py",
)
# (file, its line with the fault in it) -> why no test could tell the two apart
EQUIVALENT = {
    (
        "ldm/diffusion/spacing.py",
        "return np.round(np.arange(total, -1, -total / n)[:n]) - 1",
    ): "cut to n numbers anyway",
    (
        "ldm/diffusion/schedule.py",
        "if not -2 <= previous < t:",
    ): "alpha_bar refuses -2 next, also as a time outside",
    (
        "ldm/schedulers/config.py",
        'named = ", ".join(f"{name} = {config[name]!r}" for name in rows[1].fixed if name in config)',
    ): "only a sentence's words; the rows of one class fix the same options",
    (
        "ldm/schedulers/config.py",
        "spacing = replace(spacing, sigma_grid=grids[-1])",
    ): "there is one grid: more are refused above",
    (
        "ldm/schedulers/dpm_solver.py",
        "phi = phis(frame.hh, 4)",
    ): "one more phi, which is not used",
    (
        "ldm/schedulers/exponential.py",
        "for k in range(1, count + 1):",
    ): "one more phi, which is not used",
    (
        "ldm/schedulers/linear_multistep.py",
        "t, t_next = (int(schedule.t(max(level, schedule.sigmas[0]))) for level in (leg.sigma, leg.next))",
    ): "the time of a trained level comes out whole",
    (
        "ldm/schedulers/linear_multistep.py",
        "whole = sum((basis.deriv(k) * (-1) ** k for k in range(1, len(sigmas) + 1)), basis)",
    ): "one more derivative of a polynomial, which is 0",
    (
        "ldm/schedulers/second_order.py",
        "middle = math.sqrt(leg.sigma * down) / (1 - 1e-09)",
    ): "a billionth above the next level or below it: only not on it matters",
    (
        "ldm/schedulers/second_order.py",
        "middle = math.sqrt(leg.sigma * down) * (1 + 1e-09)",
    ): "a billionth above the next level or below it: only not on it matters",
    (
        "ldm/schedulers/table.py",
        "steps = max((n for n in range(1, nfe + 1 + 1) if self.network_calls(n) <= nfe), default=0)",
    ): "one more step than calls costs more than the budget",
    (
        "ldm/schedulers/unipc.py",
        'phi, b_of_h = phis(frame.hh, len(points) + 1), frame.hh if solver_type == "bh1" else phis(frame.hh, 2)[0]',
    ): "one more phi, which is not used",
    (
        "ldm/diffusion/grids.py",
        "for _ in range(7): # the error squares each time",
    ): "Newton's method has reached the last bit before",
    (
        "ldm/diffusion/prediction.py",
        "c_in=lambda sigma: 1 / math.hypot(sigma, sigma_data),",
    ): "hypot is symmetric",
}

KINDS = ("sign", "index", "coefficient", "order", "function", "dropped")

# Which faults there are.

SWAPPED_OPERATORS: dict[type[ast.operator], tuple[str, type[ast.operator]]] = {
    ast.Add: ("sign", ast.Sub),
    ast.Sub: ("sign", ast.Add),
    ast.Mult: ("coefficient", ast.Div),
    ast.Div: ("coefficient", ast.Mult),
    ast.FloorDiv: ("coefficient", ast.Div),
    ast.Mod: ("coefficient", ast.FloorDiv),
    ast.Pow: ("coefficient", ast.Mult),
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
EXACT = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # swapping one of these negates the comparison
FUNCTIONS: dict[str, tuple[str, ...]] = {  # "" leaves the function out and keeps its argument
    "sqrt": ("",), "exp": ("expm1", ""), "expm1": ("exp", ""), "log": ("log1p", ""), "log1p": ("log",),
    "log2": ("log",), "log10": ("log",), "round": ("floor", ""), "floor": ("ceil",), "ceil": ("floor",),
    "cos": ("sin",), "sin": ("cos",), "tan": ("sin",), "sinh": ("cosh",), "cosh": ("sinh",), "tanh": ("",),
    "atan": ("",), "arctan": ("",), "square": ("",), "abs": ("",), "clip": ("",), "clamp": ("",), "flip": ("",),
    "cumprod": ("cumsum",), "cumsum": ("cumprod",), "prod": ("sum",), "mean": ("sum",), "std": ("var",),
    "var": ("std",), "diff": ("",), "isinf": ("isnan",), "isfinite": ("isnan",), "ppf": ("cdf",), "trapezoid": ("sum",),
}  # fmt: skip
OPPOSITES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all"}
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
ORDERED = {"lerp", "pow", "atan2", "arctan2", "linspace", "geomspace", "logspace", "arange", "interp", "where",
           "divmod", "polyval", "fmod", "remainder", "subtract", "divide", "solve"}  # fmt: skip
NOT_NUMBERS = (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp)
KEYS = {"field", "key", "kind", "name"}  # what names the entry of a table
TYPES = {"dict", "list", "tuple", "set", "type", "frozenset"}
KEEPS_FLAG = {"keepdim", "keepdims", "strict", "frozen", "slots", "eq", "kw_only", "inplace"}

Edit = tuple[str, str, ast.AST, ast.AST]  # kind, what is done, where (for the id), the node instead


def number(value: float) -> ast.expr:
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))


def whole(node: ast.AST | None) -> int | None:
    """The value of an integer in the source, with its sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = whole(node.operand)
        return None if value is None else -value
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def moved(node: ast.expr, by: int) -> ast.expr:
    """node + by."""
    value = whole(node)
    if value is not None:
        return number(value + by)
    return ast.BinOp(node, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


def called(node: ast.Call) -> str:
    """The last name of what is called: "sqrt" of math.sqrt(x), x.sqrt() and sqrt(x)."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def subject(node: ast.Call) -> ast.expr | None:
    """What a function of one value is applied to: x in math.sqrt(x) and in x.sqrt()."""
    if isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("math", "np", "numpy", "torch", "F", "special")
    ):
        return node.func.value
    return node.args[0] if node.args and not isinstance(node.args[0], ast.Starred) else None


def of_arithmetic(node: ast.BinOp) -> Iterator[Edit]:
    if any(isinstance(s, NOT_NUMBERS) or isinstance(getattr(s, "value", 0), str) for s in (node.left, node.right)):
        return
    left, right, operator = node.left, node.right, type(node.op)
    if operator in SWAPPED_OPERATORS:
        kind, other = SWAPPED_OPERATORS[operator]
        yield kind, f"{operator.__name__}->{other.__name__}", right, ast.BinOp(left, other(), right)
    if operator in (ast.Add, ast.Sub, ast.Mult):
        rest = ast.UnaryOp(ast.USub(), right) if operator is ast.Sub else right
        yield "dropped", f"{operator.__name__}-left", left, rest
    if operator in (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv):
        yield "dropped", f"{operator.__name__}-right", right, left


def of_subscript(node: ast.Subscript) -> Iterator[Edit]:
    name = ast.unparse(node.value).rpartition(".")[2]
    strange = isinstance(node.slice, (ast.Slice, ast.Compare, ast.Call, ast.Attribute, *NOT_NUMBERS))
    strange = strange or (isinstance(node.slice, ast.Name) and node.slice.id in KEYS)
    if strange or name in TYPES or name[:1].isupper():  # a type, or a table, whose keys are no numbers
        return
    if isinstance(node.slice, ast.Constant) and type(node.slice.value) is not int:
        return
    for by in (1, -1):
        new = ast.Subscript(node.value, moved(node.slice, by), node.ctx)
        yield "index", f"{by:+d}", node.slice, new


def of_slice(node: ast.Slice) -> Iterator[Edit]:
    lower, upper, step = node.lower, node.upper, node.step
    if whole(step) == -1:
        yield "index", "forwards", node, ast.Slice(lower, upper, ast.Constant(1))
    elif lower is None:
        yield "index", "begins+1", node, ast.Slice(ast.Constant(1), upper, step)
    if lower is not None:
        yield "index", "begins+1", lower, ast.Slice(moved(lower, 1), upper, step)
    if upper is not None:
        yield "index", "ends-1", upper, ast.Slice(lower, moved(upper, -1), step)
        if whole(upper) != -1:
            yield "index", "ends+1", upper, ast.Slice(lower, moved(upper, 1), step)
    elif step is None:
        yield "index", "ends-1", node, ast.Slice(lower, number(-1), step)


def of_call(node: ast.Call) -> Iterator[Edit]:
    name, args = called(node), node.args

    def again(*new: ast.expr, func: ast.expr = node.func) -> ast.Call:
        return ast.Call(func, [*new], node.keywords)

    def renamed(other: str) -> ast.Call:
        if isinstance(node.func, ast.Attribute):
            return again(*args, func=ast.Attribute(node.func.value, other, ast.Load()))
        own = "int" if other == "floor" else other  # Python's own has no floor
        return again(*args, func=ast.Name(own, ast.Load()))

    for other in FUNCTIONS.get(name, ()):
        if not other:
            if (kept := subject(node)) is not None:
                yield "function", f"{name}-dropped", node, kept
        else:
            yield "function", f"{name}->{other}", node, renamed(other)
    if name == "hypot" and len(args) == 2:
        yield "function", "hypot->sum", node, ast.BinOp(args[0], ast.Add(), args[1])
    if name in OPPOSITES:
        yield "order", f"{name}->{OPPOSITES[name]}", node, renamed(OPPOSITES[name])
    if name == "reversed" and args:
        yield "order", "reversed-dropped", node, args[0]
    if name in ("range", "arange") and args:
        stop = min(1, len(args) - 1)
        for by in (1, -1):
            yield "index", f"ends{by:+d}", args[stop], again(*args[:stop], moved(args[stop], by), *args[stop + 1 :])
        if stop:
            yield "index", "begins+1", args[0], again(moved(args[0], 1), *args[1:])
    if name == "len":
        for by in (1, -1):
            yield "index", f"len{by:+d}", node, moved(node, by)
    if name == "pairwise":
        yield "index", "pairwise+1", node, again(ast.Subscript(args[0], ast.Slice(ast.Constant(1)), ast.Load()))
    if name == "enumerate" and len(args) == 1:
        yield "index", "enumerate+1", node, again(args[0], ast.Constant(1))
    yield from of_arguments(node, again)


def of_arguments(node: ast.Call, again: Any) -> Iterator[Edit]:
    name, args = called(node), node.args
    if any(isinstance(arg, ast.Starred) for arg in args):
        return
    if name == "lerp" and len(args) == 2 and isinstance(node.func, ast.Attribute):  # x.lerp(y, weight)
        func = ast.Attribute(args[0], "lerp", ast.Load())
        yield "order", "lerp-swapped", node, again(node.func.value, args[1], func=func)
    elif len(args) >= 2:
        first = int(name in ("where", "interp"))
        stems = {ast.unparse(arg).partition("_")[0] for arg in args[:2] if isinstance(arg, ast.Name)}
        alike = len(stems) == 1 and all(isinstance(arg, ast.Name) for arg in args[:2])
        made = name[:1].isupper() and any(isinstance(arg, ast.BinOp) for arg in args[:2])
        if (name in ORDERED or alike or made) and len(args) > first + 1:
            swapped = [*args[:first], args[first + 1], args[first], *args[first + 2 :]]
            yield "order", f"{name}-swapped", node, again(*swapped)


def of_logic(node: ast.AST) -> Iterator[Edit]:
    """Comparisons, conditions, `and` and `or`, flags."""
    match node:
        case ast.Compare():
            for i, old in enumerate(node.ops):
                other = COMPARISONS[type(old)]
                label = f"{type(old).__name__}->{other.__name__}"
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                yield "order", label, node.comparators[i], ast.Compare(node.left, ops, node.comparators)
        case ast.BoolOp():
            other_op: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            label = f"{type(node.op).__name__}->{type(other_op).__name__}"
            yield "order", label, node, ast.BoolOp(other_op, node.values)
            for i, value in enumerate(node.values):
                rest = [*node.values[:i], *node.values[i + 1 :]]
                yield "dropped", "operand", value, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
        case ast.Constant(value=bool()):
            yield "order", "flag", node, ast.Constant(not node.value)
        case ast.Return(value=ast.Tuple(elts=[one, two])):
            yield "order", "result-swapped", node, ast.Return(ast.Tuple([two, one], ast.Load()))


def condition(test: ast.expr) -> Iterator[Edit]:
    """The opposite of an `if`, where no other fault is the same."""
    single = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], EXACT)
    if not single and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
        yield "order", "negated", test, ast.UnaryOp(ast.Not(), test)


def edits(node: ast.AST) -> Iterator[Edit]:
    """All faults made by putting another node in the place of this one."""
    match node:
        case ast.BinOp():
            yield from of_arithmetic(node)
        case ast.AugAssign() if type(node.op) in SWAPPED_OPERATORS:
            kind, other = SWAPPED_OPERATORS[type(node.op)]
            label = f"{type(node.op).__name__}->{other.__name__}"
            yield kind, label, node.value, ast.AugAssign(node.target, other(), node.value)
        case ast.UnaryOp(op=ast.USub()):
            yield "sign", "minus-dropped", node, node.operand
        case ast.UnaryOp(op=ast.Not()):
            yield "order", "not-dropped", node, node.operand
        case ast.Subscript():
            yield from of_subscript(node)
        case ast.Slice():
            yield from of_slice(node)
        case ast.Call():
            yield from of_call(node)
        case ast.Constant(value=int() | float() as old) if type(old) is not bool:
            small = old == int(old) and old <= 100
            new = old + 1 if small else type(old)(float(f"{old * 1.2:.6g}"))
            yield "coefficient", f"{old}->{new}", node, ast.Constant(new)
            if small and old > 1:
                yield "coefficient", f"{old}->{old - 1}", node, ast.Constant(old - 1)
        case _:
            yield from of_logic(node)


# Where they are put.


@dataclass
class Mutant:
    """One fault. `owner.name` (or item `at` of that list) is the node it replaces by `new`; lines: of its statement."""

    id: str
    file: str
    line: int
    kind: str
    lines: tuple[int, int]
    before: str
    after: str
    tree: ast.Module = field(repr=False)
    owner: ast.AST = field(repr=False)
    name: str = field(repr=False)
    at: int | None = field(repr=False)
    new: ast.AST = field(repr=False)

    def code(self, place: str) -> CodeType:
        """The whole file with the fault in it."""
        old = getattr(self.owner, self.name)
        new = self.new if self.at is None else [*old[: self.at], self.new, *old[self.at + 1 :]]
        setattr(self.owner, self.name, new)
        try:
            return compile(self.tree, place, "exec")
        finally:
            setattr(self.owner, self.name, old)


def is_index(node: ast.AST) -> bool:
    """Whether whole numbers right below a node count things."""
    counts = isinstance(node, ast.Call) and called(node) in ("range", "arange")
    return counts or isinstance(node, ast.Subscript | ast.Slice)


def is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)


def bound(node: ast.AST) -> set[str]:
    """The names an assignment binds; what it stores in lists or objects counts as their name."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = (inner for target in targets if target is not None for inner in ast.walk(target))
    return {inner.id for inner in names if isinstance(inner, ast.Name)}


class Finder:
    """Walks one file and collects its mutants. Texts, types, decorators and what only words an error are left alone."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.rows, self.tree = file, text.splitlines(), ast.parse(text)
        self.found: list[Mutant] = []
        self.taken: Counter[str] = Counter()
        raised = {id(n) for r in ast.walk(self.tree) if isinstance(r, ast.Raise) for n in ast.walk(r)}
        calls = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call)]
        self.wording = {called(n) for n in calls if id(n) in raised} - {called(n) for n in calls if id(n) not in raised}
        self.visit(self.tree, (1, 1), set())

    def skipped(self, node: ast.AST) -> bool:
        match node:
            case ast.FunctionDef():
                return node.name in self.wording or any(ast.unparse(d) == "overload" for d in node.decorator_list)
            case ast.If():
                return ast.unparse(node.test) == "TYPE_CHECKING"
            case ast.keyword():
                return node.arg in KEEPS_FLAG
            case ast.Subscript():
                name = ast.unparse(node.value)
                return name in TYPES or name in ("Callable", "Literal", "NDArray", "Sequence", "Iterator", "Mapping")
        return isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr)

    def visit(self, node: ast.AST, lines: tuple[int, int], known: set[str]) -> None:
        """known: the names bound so far in the function, so that leaving out an assignment leaves an older value."""
        for name, value in ast.iter_fields(node):
            if name in ("decorator_list", "annotation", "returns", "ctx", "type_comment"):
                continue
            for at, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if not isinstance(child, ast.AST) or self.skipped(child):
                    continue
                if whole(child) is not None and is_index(node):
                    continue  # it has been moved with what it is an index of
                unit = lines
                if isinstance(child, ast.stmt):
                    body = getattr(child, "body", None)
                    unit = (child.lineno, max(child.lineno, body[0].lineno - 1) if body else child.end_lineno or 0)
                elif isinstance(child, ast.Lambda):
                    unit = (child.lineno, child.end_lineno or child.lineno)
                made = list(edits(child))
                if name in ("test", "ifs") and isinstance(child, ast.expr):
                    made += condition(child)
                if isinstance(child, ast.Assign | ast.AugAssign) and bound(child) and bound(child) <= known:
                    made.append(("dropped", "statement", child, ast.Pass()))
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                    made.append(("dropped", "statement", child, ast.Pass()))
                for edit in made:
                    self.add(edit, unit, node, name, at, child)
                inner = known
                if isinstance(child, ast.FunctionDef):
                    every = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                    inner = {arg.arg for arg in every}
                self.visit(child, unit, inner)
                if isinstance(child, ast.Assign | ast.AugAssign | ast.AnnAssign):
                    known |= bound(child)

    def add(self, edit: Edit, unit: tuple[int, int], owner: ast.AST, name: str, at: int | None, old: ast.AST) -> None:
        kind, label, where, new = edit
        if not hasattr(new, "lineno") and hasattr(old, "lineno"):  # not where a part stands for the whole
            ast.copy_location(new, old)
        ast.fix_missing_locations(new)
        line, column = getattr(where, "lineno", unit[0]), getattr(where, "col_offset", 0)
        ident = f"{self.file}:{line}:{column}:{kind}.{label}"
        self.taken[ident] += 1
        if self.taken[ident] > 1:
            ident += f"#{self.taken[ident]}"
        before, after = self.shown(owner, old, new)
        self.found.append(Mutant(ident, self.file, line, kind, unit, before, after, self.tree, owner, name, at, new))

    def shown(self, owner: ast.AST, old: ast.AST, new: ast.AST) -> tuple[str, str]:
        """The lines of the source the node stands on, as they are and with the fault."""
        first, last = getattr(old, "lineno", 1), getattr(old, "end_lineno", 1)
        text = "\n".join(self.rows[first - 1 : last]).encode()
        tail = len(self.rows[last - 1].encode()) - getattr(old, "end_col_offset", 0)
        middle = ast.unparse(new)
        if isinstance(owner, ast.BinOp | ast.UnaryOp) and is_sum(new) and not is_sum(old):
            middle = f"({middle})"
        changed = text[: getattr(old, "col_offset", 0)] + middle.encode() + (text[-tail:] if tail else b"")
        return " ".join(text.decode().split()), " ".join(changed.decode().split())


def find(sources: dict[str, str]) -> list[Mutant]:
    """All mutants of these files, in the order of the text."""
    return [mutant for file, text in sources.items() for mutant in Finder(file, text).found]


def sampled(mutants: Sequence[Mutant], limit: int) -> list[Mutant]:
    """At most so many, from every kind in every file the same number as far as it has them; always the same ones."""
    ranks: Counter[tuple[str, str]] = Counter()
    order, files = [], sorted({mutant.file for mutant in mutants})
    for mutant in sorted(mutants, key=lambda m: hashlib.sha256(m.id.encode()).digest()):
        turn = (KINDS.index(mutant.kind) + files.index(mutant.file)) % len(KINDS)  # few are not of one kind or file
        order.append((ranks[mutant.file, mutant.kind], turn, mutant.file, mutant.id))
        ranks[mutant.file, mutant.kind] += 1
    chosen = {row[-1] for row in sorted(order)[:limit]}
    return [mutant for mutant in mutants if mutant.id in chosen]


# How one is judged: in a process of its own, which sees the copy of the tree with the fault in it.

EVERYWHERE = ""  # the context of what is done once for all tests: imports, fixtures, kept results
SLOW = 1.0  # seconds; such tests come last
HANGS, TIMES = 10.0, 5.0  # a test hangs when it takes longer than so many seconds and so many times its usual time
MEMORY = 6 << 30  # bytes a child may have beyond what it begins with


class Loader(importlib.machinery.SourceFileLoader):
    """Loads one of SOURCES, with the fault if it is the faulty one; keeps no compiled file."""

    depth = 0

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def exec_module(self, module: Any) -> None:
        Loader.depth += 1
        try:
            super().exec_module(module)
        finally:
            Loader.depth -= 1


class Import:
    """A finder of modules that comes before Python's own."""

    def __init__(self, loaders: dict[str, Loader]) -> None:
        self.loaders = loaders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.loaders:
            return None
        return importlib.util.spec_from_file_location(name, self.loaders[name].path, loader=self.loaders[name])


class Session:
    """What pytest is told and asked: which tests in which order, how long one may take, who failed."""

    def __init__(self, answer: Connection, order: Sequence[str] | None, limits: dict[str, float]) -> None:
        self.answer, self.order, self.limits = answer, order, limits
        self.failed, self.now = "", "collection"
        self.seconds: dict[str, float] = {}
        self.hits: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
        self.context = EVERYWHERE

    def late(self, *_: Any) -> None:
        self.answer.send({"outcome": "timeout", "by": self.now})
        os._exit(0)

    def pytest_sessionstart(self) -> None:
        import torch

        torch.set_num_threads(1)  # after conftest has had its word

    def pytest_collectstart(self, collector: Any) -> None:
        self.context = collector.nodeid.partition("::")[0]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.order is not None:
            rank = {name: i for i, name in enumerate(self.order)}
            known = self.limits.keys()
            items[:] = sorted(
                (item for item in items if item.nodeid in rank or item.nodeid not in known),
                key=lambda item: rank.get(item.nodeid, len(rank)),
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.context, self.now = EVERYWHERE, nodeid
        signal.setitimer(signal.ITIMER_REAL, HANGS + TIMES * self.limits.get(nodeid, 60.0))

    def pytest_runtest_call(self, item: Any) -> None:
        self.context = item.nodeid

    def pytest_runtest_teardown(self) -> None:
        self.context = EVERYWHERE

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.context = EVERYWHERE
        if report.failed and not self.failed:
            self.failed = report.nodeid


def traced(session: Session, files: Iterable[str]) -> Any:
    """A trace function that notes the lines of these files by what was running."""
    wanted = set(files)

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            context = EVERYWHERE if Loader.depth else session.context
            session.hits[context].add((frame.f_code.co_filename, frame.f_lineno))
        return line

    return lambda frame, event, _: line if frame.f_code.co_filename in wanted else None


@dataclass
class Tree:
    """A copy of the repository, in which everything runs."""

    place: Path
    sources: dict[str, str]
    tests: list[str]

    @classmethod
    def copied(cls, place: Path) -> "Tree":
        """ldm/ and tests/ as they are now, and links to the rest."""
        for entry in ROOT.iterdir():
            if entry.name in ("ldm", "tests"):
                shutil.copytree(entry, place / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif entry.name == "pyproject.toml":
                shutil.copy(entry, place)
            elif not entry.name.startswith(".") and entry.name not in ("build", "dist"):
                (place / entry.name).symlink_to(entry)
        files = [path for pattern in SOURCES for path in sorted(place.glob(pattern))]
        sources = {path.relative_to(place).as_posix(): path.read_text("utf-8") for path in files}
        return cls(place, sources, [f"tests/{name}" for name in TESTS if (place / "tests" / name).is_file()])

    def path(self, file: str) -> str:
        return str(self.place / file)

    def loaders(self, mutant: Mutant | None) -> dict[str, Loader]:
        """For every file of SOURCES, or for the one with the fault."""
        found = {}
        for file, text in self.sources.items() if mutant is None else ((mutant.file, ""),):
            name, place = module_of(file), self.path(file)
            code = mutant.code(place) if mutant else compile(text, place, "exec")
            found[name] = Loader(name, place, code)
        return found

    def stamp(self) -> str:
        """Of all that the tests' verdict hangs on."""
        names = [*self.place.glob("ldm/**/*.py"), *self.place.glob("tests/*.py"), self.place / "pyproject.toml"]
        return digest(*(path.read_bytes() for path in sorted(names)))

    def concerned(self) -> set[str]:
        """The modules of ldm that every mutant must load anew: SOURCES, and what imports them, in any depth."""
        modules = {}
        for path in self.place.glob("ldm/**/*.py"):
            modules[module_of(path.relative_to(self.place).as_posix())] = imported(path.read_text("utf-8"))
        found = {module_of(file) for file in self.sources}
        while more := {name for name, wants in modules.items() if wants & found} - found:
            found |= more
        return found


def module_of(file: str) -> str:
    """ "ldm/diffusion/__init__.py" -> "ldm.diffusion"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(text: str) -> set[str]:
    """All modules a file may import, whether they are modules or names in one."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def digest(*texts: bytes) -> str:
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def serve(answer: Connection, tree: Tree, loaders: dict[str, Loader], session: Session, log: str, trace: bool) -> None:
    """In the child: run pytest on the files of the tests that were chosen, and send what came of it."""
    os.setsid()
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    gc.disable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.chdir(tree.place)
    sys.meta_path.insert(0, Import(loaders))
    signal.signal(signal.SIGALRM, session.late)
    signal.setitimer(signal.ITIMER_REAL, 60 if session.limits else 600)  # until the first test begins
    import pytest

    chosen = session.order if session.order is not None else tree.tests
    files = [file for file in tree.tests if any(name.partition("::")[0] == file for name in chosen)]
    if trace:
        sys.settrace(traced(session, map(tree.path, tree.sources)))
        threading.settrace(traced(session, map(tree.path, tree.sources)))
    code = int(
        pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", f"--tb={'short' if log != os.devnull else 'no'}",
             "-c", tree.path("pyproject.toml"), "--rootdir", str(tree.place), *files],
            plugins=[session],
        )
    )  # fmt: skip
    sys.settrace(None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    said: dict[str, Any] = {"outcome": "killed" if code else "survived", "by": session.failed or f"exit {code}"}
    if log != os.devnull:
        own = tree.path("tests")
        said["seconds"] = session.seconds
        said["modules"] = [
            n for n, m in list(sys.modules.items()) if not str(getattr(m, "__file__", "")).startswith(own)
        ]
        said["hits"] = {name: sorted(lines) for name, lines in session.hits.items()}
    answer.send(said)
    os._exit(0)


class Child:
    """A forked process that runs tests, and what it will say."""

    def __init__(
        self,
        tree: Tree,
        mutant: Mutant | None,
        order: list[str] | None,
        seconds: dict[str, float],
        log: str,
        trace: bool = False,
    ) -> None:
        fork = multiprocessing.get_context("fork")
        self.mutant, self.begun = mutant, time.monotonic()
        self.heard, answer = fork.Pipe(duplex=False)
        arguments = (answer, tree, tree.loaders(mutant), Session(answer, order, seconds), log, trace)
        self.process = fork.Process(target=serve, args=arguments)
        self.process.start()
        answer.close()
        expected = sum(seconds[name] for name in order or ()) if seconds else 600
        self.latest = self.begun + 120 + 3 * expected

    def result(self) -> dict[str, Any]:
        """When `heard` is ready, or the time is up."""
        said: dict[str, Any] = {"outcome": "timeout", "by": "the whole run"}
        if self.heard.poll():
            try:
                said = self.heard.recv()
            except EOFError:
                said = {"outcome": "killed", "by": "the process died"}
        self.end()
        return said | {"took": round(time.monotonic() - self.begun, 2)}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)  # it leads a group of its own
        self.process.kill()
        self.process.join()
        self.heard.close()


def load(names: Iterable[str], anew: set[str]) -> None:
    """Import here what every child would import, but for what it must; what has no name to import is left to it too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name in anew or name in sys.modules:
                continue
            with contextlib.suppress(Exception):
                importlib.import_module(name)


@dataclass
class Baseline:
    """How the tests do with no fault: the seconds of each, and the contexts in which a line of a file is run."""

    seconds: dict[str, float]
    contexts: dict[tuple[str, int], set[str]]

    @classmethod
    def measured(cls, tree: Tree, kept: Path) -> "Baseline":
        """Run the tests twice, or read what an earlier run over the same files wrote. SystemExit: they do not pass."""
        stamp, anew, said = tree.stamp(), tree.concerned(), None
        if kept.is_file():
            said = json.loads(kept.read_text("utf-8"))
        if said is None or said["stamp"] != stamp:
            print(f"running {len(tree.tests)} test files with no fault, twice", flush=True)
            plain = cls.run(tree, None, trace=False)
            load(plain["modules"], anew)
            names = quickest(plain["seconds"], plain["seconds"])  # another order: no test may hang on those before it
            lines = cls.run(tree, names, trace=True)
            quick = {name: min(took, lines["seconds"][name]) for name, took in plain["seconds"].items()}
            hits = [
                (Path(file).relative_to(tree.place).as_posix(), line, context)
                for context, found in lines["hits"].items()
                for file, line in found
            ]
            said = {"stamp": stamp, "modules": plain["modules"], "seconds": quick, "hits": hits}
            kept.write_text(json.dumps(said), "utf-8")
        load(said["modules"], anew)
        contexts: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        for file, line, context in said["hits"]:
            contexts[file, line].add(context)
        for file, text in tree.sources.items():  # a result that is kept is seen by who did not compute it
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and any("cache" in ast.unparse(d) for d in node.decorator_list):
                    for line in range(node.lineno, (node.end_lineno or 0) + 1):
                        contexts[file, line].add(EVERYWHERE)
        return cls(said["seconds"], contexts)

    @staticmethod
    def run(tree: Tree, order: list[str] | None, trace: bool) -> dict[str, Any]:
        log = tree.path("baseline.log")
        child = Child(tree, None, order, {}, log, trace)
        wait([child.heard], timeout=child.latest - child.begun)
        said = child.result()
        if said["outcome"] != "survived":
            raise SystemExit(Path(log).read_text("utf-8") + f"the tests fail with no fault: {said['by']}")
        return said

    def order(self, mutant: Mutant) -> list[str]:
        """The tests that can see a fault: first those that reach its lines."""
        first, last = mutant.lines
        found = set().union(*(self.contexts.get((mutant.file, line), ()) for line in range(first, last + 1)))
        everywhere = any("::" not in name and not name.endswith(".py") for name in found)
        near = [name for name in self.seconds if name in found]
        far = [name for name in self.seconds if everywhere or name.partition("::")[0] in found]
        return quickest(near, self.seconds) + quickest(set(far) - set(near), self.seconds)


def quickest(names: Iterable[str], seconds: dict[str, float]) -> list[str]:
    """The quick tests first, and of the cases of one test function one at a time; the slow ones last."""
    ranks: Counter[str] = Counter()
    keys = {}
    for name in sorted(names, key=lambda name: (seconds[name], name)):
        function = name.partition("[")[0]
        keys[name] = (seconds[name] > SLOW, ranks[function], seconds[name])
        ranks[function] += 1
    return sorted(keys, key=lambda name: keys[name])


def same(left: CodeType, right: CodeType) -> bool:
    """Whether two pieces of compiled code do the same, wherever they stand."""
    ours, theirs = left.co_consts, right.co_consts
    return (
        (left.co_code, left.co_names, left.co_varnames) == (right.co_code, right.co_names, right.co_varnames)
        and len(ours) == len(theirs)
        and all(same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else repr(a) == repr(b)
                for a, b in zip(ours, theirs, strict=True))
    )  # fmt: skip


def judged(
    tree: Tree, baseline: Baseline, mutants: Sequence[Mutant], jobs: int
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """What became of each, as they end; so many at a time."""
    waiting, running = list(reversed(mutants)), dict[Any, Child]()
    originals = {file: compile(text, tree.path(file), "exec") for file, text in tree.sources.items()}
    gc.collect()
    gc.freeze()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                order = baseline.order(mutant)
                if same(mutant.code(tree.path(mutant.file)), originals[mutant.file]):
                    yield mutant, {"outcome": "same", "by": "the bytecode is the original's", "took": 0.0}
                elif not order:
                    yield mutant, {"outcome": "survived", "by": "no test reaches it", "took": 0.0}
                else:
                    child = Child(tree, mutant, order, baseline.seconds, os.devnull)
                    running[child.heard] = child
            ready = wait(list(running), timeout=1)
            for heard in [h for h, child in running.items() if h in ready or time.monotonic() > child.latest]:
                child = running.pop(heard)
                assert child.mutant is not None
                yield child.mutant, child.result()
    finally:
        for child in running.values():
            child.end()


# What is told.


def table(mutants: Sequence[Mutant], results: dict[str, dict[str, Any]]) -> str:
    """Per file and kind, per kind, per file and in all: enumerated, judged, and what became of them."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for mutant in mutants:
        outcome = results.get(mutant.id, {}).get("outcome", "waiting")
        for key in {(mutant.file, mutant.kind), (mutant.file, "all"), ("all", mutant.kind), ("all", "all")}:
            counts[key].update(["enumerated", outcome])
    names = ("enumerated", "killed", "timeout", "survived", "same", "equivalent")
    lines = [f"{'file':<40} {'kind':<12}" + "".join(f"{name:>11}" for name in names) + f"{'rate':>8}"]
    for (file, kind), row in sorted(
        counts.items(), key=lambda item: (item[0][0] == "all", item[0][0], item[0][1] == "all")
    ):
        caught = row["killed"] + row["timeout"]
        rate = f"{caught / total:8.1%}" if (total := caught + row["survived"]) else f"{'':>8}"
        lines.append(f"{file:<40} {kind:<12}" + "".join(f"{row[name]:>11}" for name in names) + rate)
    return "\n".join(lines)


def remembered(report: Path, tree: Tree, stamp: str) -> dict[str, dict[str, Any]]:
    """Earlier results that still hold: of the same file, and for survivors of the same tests too."""
    found = {}
    for line in report.read_text("utf-8").splitlines() if report.is_file() else ():
        row = json.loads(line)
        fresh = row["file"] in tree.sources and row["source"] == digest(tree.sources[row["file"]].encode())
        if fresh and (row["outcome"] != "survived" or row["tests"] == stamp):
            found[row["id"]] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the faults and run nothing")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="those whose id (file:line:column:kind) has it")
    parser.add_argument("--limit", type=int, help="so many, spread evenly over files and kinds")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    parser.add_argument("--report", type=Path, default=ROOT / "build/mutants.jsonl", help="a JSON line for each")
    parser.add_argument("--resume", action="store_true", help="keep what the report holds and still is true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        tree = Tree.copied(Path(place).resolve())
        mutants = [m for m in find(tree.sources) if fnmatch(m.id, f"*{asked.only}*")]
        if asked.limit is not None:
            mutants = sampled(mutants, asked.limit)
        if asked.list:
            for m in mutants:
                print(f"{m.id}\n  - {m.before}\n  + {m.after}")
            print(len(mutants), dict(Counter(m.kind for m in mutants)))
        else:
            run(tree, mutants, asked.report.resolve(), asked.jobs, asked.resume)


def run(tree: Tree, mutants: Sequence[Mutant], report: Path, jobs: int, resume: bool) -> None:
    """Judge them, write the report, print the table and the survivors."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(tree.place))
    sys.pycache_prefix = tree.path("pycache")
    report.parent.mkdir(parents=True, exist_ok=True)
    stamp = tree.stamp()
    results = remembered(report, tree, stamp) if resume else {}
    baseline = Baseline.measured(tree, report.with_suffix(".baseline.json"))
    with report.open("w", encoding="utf-8") as handle:
        for row in results.values():
            handle.write(json.dumps(row) + "\n")
        for m in mutants:
            if (m.file, m.after) in EQUIVALENT:
                results[m.id] = {"outcome": "equivalent", "by": EQUIVALENT[m.file, m.after]}
        left, begun = [m for m in mutants if m.id not in results], time.monotonic()
        for done, (m, said) in enumerate(judged(tree, baseline, left, jobs), 1):
            row = {"id": m.id, "file": m.file, "kind": m.kind, "before": m.before, "after": m.after, **said}
            row |= {"source": digest(tree.sources[m.file].encode()), "tests": stamp}
            results[m.id] = row
            handle.write(json.dumps(row) + "\n")
            handle.flush()
            print(f"{done}/{len(left)} {said['outcome']:<8} {said['took']:6.2f} s  {m.id}  {said['by']}", flush=True)
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{len(left)} judged in {minutes:.1f} minutes\n\n{table(mutants, results)}\n\nSurvivors")
    for m in mutants:
        if results[m.id]["outcome"] == "survived":
            print(f"{m.id}\n  - {m.before}\n  + {m.after}")


if __name__ == "__main__":
    main()
