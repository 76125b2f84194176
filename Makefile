# shardc: `make` or `make help` lists what there is.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
TOOLS  := $(VENV)/.stamp-tools
READY  := $(VENV)/.stamp-ready
SITE   := $(VENV)/.stamp-docs

# Wheels that pip is told to look for (PIP_FIND_LINKS, separated by spaces) are told to uv, which separates by commas.
empty  :=
space  := $(empty) $(empty)
comma  := ,
ifneq ($(strip $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit fuzz opinfo zoo docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install shardc in it, editable, with all that development needs

demo: $(READY) ## plan Llama-3-8B for 32 GPUs, then train a small Llama on a virtual mesh beside a single device
	$(PY) examples/demo.py

test: lint ## set-up, lint, types and all tests; pyright, which takes one core, runs beside the tests
	@$(MAKE) --no-print-directory -j 2 types unit

lint: $(READY) ## ruff
	$(PY) -m ruff check .

types: $(READY) ## pyright, strict
	$(PY) -m pyright

unit: $(READY) ## the tests alone
	$(PY) -m pytest -n 2 --dist worksteal -q

opinfo: $(READY) ## every operator of torch's database in every layout; writes docs/opinfo.md
	PYTHONPATH=.:tests $(PY) -m opinfo --jobs 2

fuzz: $(READY) ## the property tests, five times as long (20 minutes), from a new seed (or make fuzz SEED=3, printed first)
	SHARDC_SEED=$(or $(SEED),$(shell date +%s)) SHARDC_FUZZ=5 $(PY) -m pytest -n 2 --dist worksteal tests/property

zoo: $(READY) ## every model of the zoo on every mesh
	$(PY) -m pytest -n 2 --dist worksteal -q tests/zoo tests/end_to_end/test_models.py --whole-zoo

docs: $(SITE) ## the pages and the reference as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shardc needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Choose another with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt uv
	@touch $@

$(READY): $(TOOLS) pyproject.toml constraints.txt
	$(VENV)/bin/uv pip install -q -p $(VENV) --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

$(SITE): $(READY)
	$(VENV)/bin/uv pip install -q -p $(VENV) -c constraints.txt -e '.[dev,docs]'
	@touch $@
