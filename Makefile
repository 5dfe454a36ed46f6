# make compress   compress the embedded model      make check   lint, format, types
# make benchmark  measure dense against pruned     make test    the quick tests
#                                                 (make test-thorough, make test-slow: the others)
# make docs       the documentation as pages        make pins    pin all packages anew
# make ship-demo  a bundle onto two SSH servers here, which needs Debian's openssh-server
#
# MODEL=digits-vit picks the other embedded model, ARGS="--budget 'macs 0.6'" adds flags, VENV=path moves the environment.

VENV ?= .venv
MODEL ?= digits-resnet
ARGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3 python; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo "$$p" && break; done)

# The environment is made again only when what is pinned changed: the stamp's name holds a hash of its contents.
PINS := $(shell cat requirements.txt pyproject.toml | cksum | tr -cd '0-9')
STAMP := $(VENV)/.installed-$(PINS)
BIN := $(VENV)/bin

SHELL := /bin/sh
# Container images set this; every process would then compile torch anew, for 3 to 12 seconds.
unexport PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help compress benchmark ship-demo test test-thorough test-slow check docs clean pins install

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# The command's own last line, one JSON object, is the last line of stdout: everything else here goes to stderr.
compress: $(STAMP)
	@$(BIN)/compressor compress --model $(MODEL) $(ARGS)

benchmark: $(STAMP)
	@$(BIN)/compressor benchmark --model $(MODEL) --precisions fp32,fp16,int8 $(ARGS)

ship-demo: $(STAMP)
	@$(BIN)/python benchmarks/ship_demo.py $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(ARGS)

# Whole jobs and many networks; with `make test`, every test that is no matter of minutes.
test-thorough: $(STAMP)
	@$(BIN)/python -m pytest -m "thorough and not slow" $(ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict compressor

# Into build/docs; a broken link or reference is an error. The pages' own packages (Python 3.11 or later) have pins beside them.
docs: $(STAMP)
	@uv=$$(command -v uv || echo $(BIN)/uv); \
	"$$uv" pip install --quiet --python $(BIN)/python --require-hashes -r docs/requirements.txt >&2
	@$(BIN)/python -m sphinx --quiet --fail-on-warning docs build/docs
	@echo "build/docs/index.html" >&2

install: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)" >&2; "$(PYTHON)" -m venv $(VENV) >&2; }
	@echo "installing the pinned packages into $(VENV); the first time takes minutes" >&2
	@uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then \
		test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv >&2; uv=$(BIN)/uv; \
	fi; \
	if "$$uv" pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt >&2; then \
		"$$uv" pip install --quiet --python $(BIN)/python --no-deps -e . >&2; \
	else \
		echo "uv could not install them; pip, which reads its own settings, tries" >&2; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt >&2 && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e . >&2; \
	fi
	@rm -f $(VENV)/.installed-*
	@touch $(STAMP)

# Resolves pyproject.toml anew into hashed pins for every platform; no index address enters the file.
pins:
	@uv=$$(command -v uv || echo $(BIN)/uv); \
	"$$uv" pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.10 --generate-hashes \
		--no-strip-extras --no-emit-index-url --no-annotate --no-header --output-file requirements.txt >&2; \
	printf 'furo\nmyst-parser\nsphinx\n' | "$$uv" pip compile - --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --constraint requirements.txt --output-file docs/requirements.txt >&2

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
