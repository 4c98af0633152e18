# Every target says what it does, and doing it again does only what is missing.
#   PYTHON=python3.12   the Python (3.11 or newer) the environment is made with
#   VENV=.venv          where the environment lies
#   PROMPT="..."        what `make demo` draws, into OUT=out/demo.png
#   RECIPE=cpu          what `make weights` trains: configs/cpu, configs/flagship (one accelerator) or configs/quick (a trial)
#   JOBS=2              how many processes `make test` uses; PYTEST_ARGS="-k vae" is handed to pytest
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a taco on a red background
OUT ?= out/demo.png
RECIPE ?= cpu
JOBS ?= 2
PYTEST_ARGS ?=

# A prompt reaches the command through the environment and is never pasted into a shell line, so that quotes, spaces
# and dollar signs in it survive.
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
export PROMPT OUT

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
SAY := @printf '==> %s\n'

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types docs weights clean

help: ## show this list
	@printf 'make TARGET, where TARGET is one of\n'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.core ## draw PROMPT="..." with the model in the box, and say where the picture lies
	$(SAY) "drawing: $$PROMPT"
	@mkdir -p "$$(dirname "$$OUT")"
	@$(BIN)/ldm generate --overwrite -o "$$OUT" -- "$$PROMPT"
	$(SAY) "the picture lies in $$OUT"

test: $(VENV)/.dev ## run the everyday tests (minutes on two cores)
	$(SAY) 'running the everyday tests; those marked slow: $(BIN)/pytest -m slow'
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=10 $(PYTEST_ARGS)

check: lint types test ## all that CI checks: lint, types, tests

lint: $(VENV)/.dev ## lint and formatting (ruff)
	$(SAY) 'ruff check'
	@$(BIN)/python -m ruff check .
	$(SAY) 'ruff format --check'
	@$(BIN)/python -m ruff format --check .

types: $(VENV)/.dev ## types (mypy strict on ldm/)
	$(SAY) 'mypy'
	@$(BIN)/python -m mypy

docs: $(VENV)/.docs ## build the documentation as a site into out/site, offline
	$(SAY) 'zensical build'
	@$(BIN)/zensical build --strict --clean
	$(SAY) 'the site begins in out/site/index.html'

STAGES := first-stage clip denoiser tiny-decoder distill classifier

weights: $(VENV)/.train ## train a model again from nothing, by RECIPE=cpu (hours; goes on where it was stopped)
	$(if $(wildcard configs/$(RECIPE)/first_stage.yaml),,$(error there is no recipe configs/$(RECIPE); give RECIPE=cpu, flagship or quick))
	@for stage in $(STAGES); do \
	  config=configs/$(RECIPE)/$$(printf '%s' "$$stage" | tr - _).yaml; \
	  printf '==> %s, by %s\n' "$$stage" "$$config"; \
	  $(BIN)/ldm train "$$stage" --config "$$config" || exit; \
	done

clean: ## remove the environment, caches, builds and demo pictures (training runs stay)
	$(SAY) 'removing $(VENV), out/, dist/ and caches'
	@rm -rf "$(VENV)" out dist build .cache .mypy_cache .pytest_cache .ruff_cache
	@find ldm tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The environment is made in layers: .core draws; .train, .dev and .docs are the extras of pyproject.toml on top of it.
# A layer is installed again when pyproject.toml or constraints.txt is newer than its stamp.
$(VENV)/.core: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  printf 'ldm needs Python 3.11 or newer, and %s is %s; name a newer one with: make %s PYTHON=python3.12\n' \
	    '$(PYTHON)' "$$("$(PYTHON)" --version 2>&1 | head -n 1)" '$(or $(MAKECMDGOALS),demo)' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  printf '%s cannot make environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)\n' \
	    '$(PYTHON)' >&2; exit 1; }
	$(SAY) "making the environment $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv "$(VENV)"
	$(SAY) 'installing ldm and what drawing needs, in the versions of constraints.txt'
	@$(INSTALL) --editable .
	@touch "$@"

$(VENV)/.train $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.core
	$(SAY) 'installing the extra [$*], in the versions of constraints.txt'
	@$(INSTALL) --editable ".[$*]"
	@touch "$@"
