# Two commands: `make demo` and `make test`. Both set everything up first; setup does nothing when
# nothing changed. Tests also run every export target, so they install those as well.
PYTHON ?= python3.11
VENV ?= .venv
# Arguments that choose another build of torch, for instance a CUDA one (see README).
TORCH_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
EDGE_STAMP := $(VENV)/.edge-$(shell cat pyproject.toml constraints*.txt | sha256sum | cut -c1-16)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
PYTEST_ARGS ?=

.PHONY: demo test check setup setup-edge clean

demo: setup
	$(BIN)/understudy distill digits --out runs/demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: setup-edge
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

setup-edge: $(EDGE_STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable '.[train,search,dev]'
	rm -f $(VENV)/.installed-*
	touch $@

$(EDGE_STAMP): $(STAMP)
	$(PIP) --no-deps --requirement constraints-edge.txt
	rm -f $(VENV)/.edge-*
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
