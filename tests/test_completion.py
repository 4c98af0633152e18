"""Shell completion, NO_COLOR and --quiet, with the command in a process and a terminal of its own."""

import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.prediction import Estimate
from ldm.schedulers import SCHEDULERS, from_config
from ldm.schedulers.table import find

LDM = [sys.executable, "-m", "ldm"]
BARE = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "LINES")}
QUICK = BARE | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
DETECT_NO_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the shell is named in place of asked for


def ldm(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, without a terminal."""
    return subprocess.run([*LDM, *words], capture_output=True, text=True, timeout=60, env=QUICK | variables)


def asked(*words: str) -> dict[str, str]:
    """How bash asks how a line may go on whose last word is not finished."""
    return {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("ldm", *words)), "COMP_CWORD": str(len(words))}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["gen"], ["generate"]),
        (["g"], ["generate", "grid", "gallery"]),
        (["generate", "--sch"], ["--scheduler", "--schedule-type"]),
        (["generate", '"an owl"', "--scheduler", "dpm++2m"], ["dpm++2m", "dpm++2m_sde", "dpm++2m_sde_heun"]),
        (["grid", "--schedule-type", "l"], ["lu", "leading", "linspace"]),
        (["generate", "--profile", ""], ["diffusers", "a1111"]),
        (["generate", "--noise-source", "g"], ["gpu"]),
        (["train", "fi"], ["first-stage"]),
        (["generate", '"an owl"', "--variation-s"], ["--variation-strength", "--variation-seed"]),
        (["nothing-of-that-name"], []),
    ],
)
def test_words_are_completed(run, monkeypatch, words: list[str], wanted: list[str]) -> None:
    """In this process; those below have their own."""
    for name, value in asked(*words).items():
        monkeypatch.setenv(name, value)
    done = run()
    assert (done.code, done.out.split(), done.err) == (0, wanted, "")


def test_completing_loads_little() -> None:
    """No torch, and few modules: what they cost is the same in every hour of a machine."""
    done = ldm(**asked("generate", "--scheduler", "he"), PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout.split() == ["heun"]
    loaded = {row.rsplit("|", 1)[1].strip() for row in done.stderr.splitlines() if row.startswith("import time:")}
    assert "ldm.cli" in loaded and len(loaded) <= 400 and not {"torch", "numpy", "PIL"} & loaded


@pytest.mark.slow  # its figure is wrong while other tests run beside it; last run 2026-11-21, passed
def test_completing_costs_little() -> None:
    """The least CPU time of three."""

    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ldm(**asked("generate", "--scheduler", "he")).stdout.split() == ["heun"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    cost()  # the first one may write bytecode
    assert min(cost() for _ in range(3)) < 0.6


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_a_script_is_printed_for_each_shell(shell: str) -> None:
    done = ldm("--show-completion", shell, **DETECT_NO_SHELL)
    assert done.returncode == 0 and done.stderr == ""
    assert f"complete_{shell}" in done.stdout and "ldm" in done.stdout


def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    """The script in bash itself, which asks a command of that name."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (tmp_path / "ldm").write_text(f'#!{bash}\nexec "{sys.executable}" -c "from ldm.cli import main; main()" "$@"\n')
    (tmp_path / "ldm").chmod(0o755)
    script = ldm("--show-completion", "bash", **DETECT_NO_SHELL).stdout
    typed = 'COMP_WORDS=(ldm generate --schedule); COMP_CWORD=2; _ldm_completion ldm; printf "%s\\n" "${COMPREPLY[@]}"'
    search = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "--norc", "-c", f"{script}\n{typed}"], capture_output=True, text=True, timeout=60, env=QUICK | search
    )
    assert (done.stdout, done.stderr) == ("--scheduler\n--schedule-type\n", "")


# -- ldm schedulers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_lists_fit_the_terminal(run, monkeypatch, columns: int) -> None:
    """No line is longer, and no name is broken."""
    monkeypatch.setenv("COLUMNS", str(columns))
    said = run("schedulers").out
    assert max(map(len, said.splitlines())) <= columns
    for row in SCHEDULERS.values():
        assert re.search(rf"^{re.escape(row.name)} +[12] +(none|fresh|eta) ", said, re.MULTILINE)
        assert all(re.search(rf"(^|\s){re.escape(name)}\s", said) for name in (row.label, *row.classes[:1]) if name)
    for grid in GRIDS.values():
        assert re.search(rf"^{grid.name} +{grid.label} ", said, re.MULTILINE)


def test_what_is_said_of_schedulers_is_so(run) -> None:
    """Names, network calls and noise, by running each on a denoiser that always says the same."""
    told = json.loads(run("schedulers", "--json").out)
    assert [row["name"] for row in told["schedule_types"]] == list(GRIDS)
    assert [row["name"] for row in told["schedulers"]] == list(SCHEDULERS)
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    x = torch.randn(1, 4, 2, 2)
    for row in told["schedulers"]:
        for name in (row["a1111"], *row["aliases"]):
            assert not name or find(name)[0].name == row["name"]
        for eta in (None, 0.5) if row["noise"] == "eta" else (None,):
            calls, drawn = list[float](), list[float]()
            sampling = from_config(config, row["name"])
            levels = sampling.levels(8)

            def denoise(x: torch.Tensor, sigma: float) -> Estimate:
                calls.append(sigma)  # noqa: B023
                return Estimate(x / 10)

            def noise(sigma: float, following: float) -> torch.Tensor:
                drawn.append(sigma)  # noqa: B023
                return x

            list(sampling.solver(eta)(denoise, x, levels.sigmas, noise, None))
            assert bool(drawn) == (row["noise"] == "fresh" or eta is not None), row
            assert abs(len(calls) - 8 * row["calls"]) <= 1, row


# -- on a terminal ----------------------------------------------------------------------------------------------------


def on_terminal(*words: str | Path, **variables: str) -> str:
    """What the command sends to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    given = QUICK | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"} | variables
    with subprocess.Popen([*LDM, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=given) as process:
        os.close(theirs)
        sent = b"".join(arriving(ours))
        process.wait(60)
    os.close(ours)
    return sent.decode("utf-8")


def arriving(terminal: int) -> Iterator[bytes]:
    """What comes until the other side is closed, which Linux calls an error."""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            return
        if not part:
            return
        yield part


def colours(sent: str) -> set[int]:
    """The parameters of the escapes that set a colour (ECMA-48, SGR: 30 to 48; 90 to 107 of xterm)."""
    parameters = (int(p) for codes in re.findall(r"\x1b\[([\d;]+)m", sent) for p in codes.split(";") if p)
    return {p for p in parameters if 30 <= p <= 38 or 40 <= p <= 48 or 90 <= p <= 107}


@pytest.mark.parametrize("words", [("--help",), ("generate", "--help"), ("schedulers",)])
def test_no_color_leaves_none(words: tuple[str, ...]) -> None:
    plain = on_terminal(*words, NO_COLOR="1")
    assert len(plain) > 500 and colours(plain) == set()
    if "--help" in words:
        assert colours(on_terminal(*words))  # else nothing was shown by the line above


def test_an_error_has_no_colour() -> None:
    assert on_terminal("generate", "an owl", "--steps", "few", NO_COLOR="1").startswith("error: ")


def test_the_preview_without_colour(model: Path, tmp_path: Path) -> None:
    """Half blocks in black and white, and a bar."""
    order = ("generate", "an owl", "--model", model, "--seed", "7", "--preview", "-o", tmp_path / "owl.png")
    sent = on_terminal(*order, NO_COLOR="1")
    assert "seed 7" in sent and re.search("[\u2580\u2584\u2588]", sent) and "drawing" in sent
    assert colours(sent) == set()


def test_quiet_says_nothing_even_to_a_terminal(model: Path, tmp_path: Path) -> None:
    """Neither seed nor bar nor preview; the path on stdout is the result, which here is the same terminal."""
    path = tmp_path / "owl.png"
    order = ("generate", "an owl", "--model", model, "--seed", "7", "--quiet", "--preview", "-o", path)
    assert on_terminal(*order) == f"{path}\r\n" and path.is_file()
