# On a fresh machine: `make demo` does the main job, `make test` checks everything. Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# A machine without CUDA wants PyTorch's build for the CPU: set TORCH_INDEX to its index where pip needs telling.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PIP_TORCH := $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test light lint types docs format clean

demo: $(VENV)/.installed-demo
	$(BIN)/alembert demo --output runs/demo

test: lint types docs
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest --numprocesses logical

light: $(VENV)/.installed-dev
	test -d runs/demo/model || $(MAKE) demo
	$(BIN)/alembert export runs/demo/model --output runs/demo-light --overwrite
	scripts/check_light_install.sh runs/demo-light $(BIN)/python

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP_TORCH) "$(TORCH)"

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(PIP) --editable ".[$*]"
	touch $@
