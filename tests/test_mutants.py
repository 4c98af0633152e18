"""The faults that bench/mutants.py puts in: the ones meant, each of them compiles, and none is in what is only said."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TEXT = '''"""Doc 1 + 1."""
import math
Kind = dict[str, tuple[int, ...]]

def step(x: "list[1]", sigmas, n: int = 2, name="1 - 1"):
    """Doc 2 - 2."""
    if n < 1:
        raise ValueError(f"{n - 1} is below {1 + 0}: {worded(n)}")
    x = x + sigmas[0] / math.sqrt(n)
    x = x.lerp(-n, 0.5)
    return x[1:]

def worded(n):
    return n * 7
'''
AFTER = {  # what stands on line 9 and 10 with each fault
    "x = x - sigmas[0] / math.sqrt(n)", "x = sigmas[0] / math.sqrt(n)", "x = x", "pass",
    "x = x + sigmas[0] * math.sqrt(n)", "x = x + sigmas[0]", "x = x + sigmas[1] / math.sqrt(n)",
    "x = x + sigmas[-1] / math.sqrt(n)", "x = x + sigmas[0] / n",
    "x = (-n).lerp(x, 0.5)", "x = x.lerp(n, 0.5)", "x = x.lerp(-n, 0.6)",
}  # fmt: skip


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    path = Path(__file__).parents[1] / "bench/mutants.py"
    spec = importlib.util.spec_from_file_location("bench_mutants", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_faults_are_those_of_the_mathematics(mutants: ModuleType) -> None:
    found = mutants.find({"a.py": TEXT})
    assert {m.after for m in found if m.line in (9, 10)} == AFTER
    assert {m.line for m in found} == {5, 7, 9, 10, 11}  # neither texts nor types nor what words an error
    assert {m.after for m in found if m.line == 11} == {"return x[2:]", "return x[1:-1]"}
    assert len({m.id for m in found}) == len(found) and {m.kind for m in found} == set(mutants.KINDS)
    original = compile(TEXT, "a.py", "exec")
    assert mutants.same(original, compile("\n" + TEXT, "a.py", "exec"))
    for mutant in found:
        assert not mutants.same(original, mutant.code("a.py")), mutant.id


def test_a_sample_is_even_and_always_the_same(mutants: ModuleType) -> None:
    found = mutants.find({name: TEXT for name in ("a.py", "b.py")})
    chosen = mutants.sampled(found, 12)
    assert {(m.file, m.kind) for m in chosen} == {(file, kind) for file in ("a.py", "b.py") for kind in mutants.KINDS}
    assert [m.id for m in chosen] == [m.id for m in mutants.sampled(found[::-1], 12)][::-1]


def test_the_files_it_names_are_there(mutants: ModuleType) -> None:
    root = Path(__file__).parents[1]
    assert any(any(root.glob(pattern)) for pattern in mutants.SOURCES)
    assert any((root / "tests" / name).is_file() for name in mutants.TESTS)
