# make demo    sets up .venv and shows the whole chain on the embedded model (fitout demo)
# make test    sets up .venv with the development tools and runs the tests
# make check   ruff (lint and format) and mypy
# make setup   everything that test and check need, without running them
# make clean   removes .venv and caches; runs/ stays
#
# Nothing is installed outside .venv. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
CORE := .venv/.installed-core
DEV := .venv/.installed-dev

.PHONY: demo test check setup clean

demo: $(CORE)
	$(BIN)/fitout demo

test: $(DEV)
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(DEV)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find fitout tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted installation is taken up again.
# torch comes first and alone: pip takes the build that its own configuration offers for this machine.
$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Fitout needs Python 3.11 or later; $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, for example: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 1; }
	@echo "setting up .venv (once; a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) "$(TORCH)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	@echo "adding the development tools to .venv"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
