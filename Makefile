# make demo   the main job on the documentation of this machine; writes fullrank-demo/
# make test   every check: style, types, layers, docs, tests, the wheel without extras
#
# Both create .venv and install everything into it. Settings:
#   PYTHON=python3.12       another interpreter (3.11 or newer)
#   TORCH_INDEX=URL         an extra package index to take torch from, e.g. PyTorch's CPU wheels
#   DEMO_ARGS="--quick"     passed on to `fullrank demo`
#   JOBS=2                  checks, and test files, that run side by side

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed

.PHONY: demo test install format lint types layers docs unit wheel clean

demo: install
	$(BIN)/fullrank demo $(DEMO_ARGS)

# Checks that keep one core busy each go side by side; the tests have all cores to themselves.
test: install
	$(MAKE) -j $(JOBS) lint types layers docs wheel
	$(MAKE) unit

install: $(INSTALLED)

# torch first and alone: its version is pinned, and what it would bring along is checked.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) scripts/check_python.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python scripts/install_torch.py $(TORCH_INDEX)
	$(PIP) install --quiet -c constraints.txt -e '.[all,docs,dev]'
	touch $@

format: install
	$(BIN)/ruff format src tests benchmarks examples scripts
	$(BIN)/ruff check --fix src tests benchmarks examples scripts

lint: install
	$(BIN)/ruff format --check src tests benchmarks examples scripts
	$(BIN)/ruff check src tests benchmarks examples scripts

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

wheel: install
	$(BIN)/python scripts/check_wheel.py

clean:
	rm -rf .venv dist build site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
