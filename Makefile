# Every target does its own set-up, and finds it done the second time.
#   make check   ruff and mypy               make demo    a killed and resumed GLUE run, with a picture
#   make test    the test suite              make test-slow     sweeps, long kills, Slurm
#   make test-async   what trains, once more with asynchronous saves
#   make chaos   1,300 random SIGKILLs       make test-lowest   the suite on the lowest versions of setup.cfg
#   make bench   the benchmarks, as one table      make docs    all pages and the API reference, as a site
#   make test-skypilot   SkyPilot's own parser on what we give it
#   make test-trainers   trainers and commands of TRL, sentence-transformers, peft and ms-swift, killed and resumed
#   make test-pythons    import and basic tests on each Python of setup.cfg that is here
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help check test test-slow test-async chaos test-lowest test-skypilot test-trainers test-pythons demo bench docs clean

PYTHON ?= python3
AZURITE := 3.35.0
AXE := 4.14.1
SKYPILOT := 0.14.1
CHAOS_KILLS ?= 1000
WORKERS ?= 2
PYTEST_ARGS ?=

# Demo and benchmarks stay on this machine, whatever proxy or hub the shell is set up for. tests/conftest.py does the
# same for the tests.
ALONE := env -u http_proxy -u https_proxy -u all_proxy -u HTTP_PROXY -u HTTPS_PROXY -u ALL_PROXY \
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Halves of the suite, so that a file stays on one worker for what its tests share; who is done first helps the other.
TESTS := -n $(WORKERS) --dist worksteal -rR $(PYTEST_ARGS)

PIP_INSTALL := pip install --quiet --disable-pip-version-check -e '.[s3,gcs,azure,report,ui,dev]'
INSTALLED := .venv/.installed
LOWEST := .venv-lowest/.installed
SERVERS := .servers/.azurite-$(AZURITE)-axe-$(AXE)
TRAINERS := .venv-trainers/.installed
SWIFT := .venv-swift/.installed
PARSER := .venv-skypilot/.skypilot-$(SKYPILOT)
SITE := .venv-docs/.installed

CHROMIUM := .servers/.apt-chromium
SLURM := .servers/.apt-slurm

help:
	@sed -n '1,/^SHELL/s/^# *//p' Makefile

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: $(INSTALLED) $(SERVERS) $(CHROMIUM) $(SLURM)
	.venv/bin/python -m pytest tests $(TESTS)

# What takes minutes: sweeps over every request and every change of a disk, kills of whole torchrun jobs, a real Slurm.
test-slow: $(INSTALLED) $(SERVERS) $(CHROMIUM) $(SLURM)
	.venv/bin/python -m pytest tests -m slow $(TESTS)

# What trains, once more with every save staged, however small.
STAGED := $(or $(TMPDIR),/tmp)/cloudtrain-staged-saves
test-async: $(INSTALLED) $(SERVERS)
	rm -f $(STAGED)
	STAGED_SAVES=$(STAGED) .venv/bin/python -m pytest -m "slow or not slow" tests/corpus tests/laws \
		tests/integration/test_emergency.py tests/integration/test_loop*.py tests/integration/test_trainer*.py $(TESTS)

chaos: $(INSTALLED) $(SERVERS)
	CHAOS_KILLS=$(CHAOS_KILLS) .venv/bin/python -m pytest tests/chaos -m chaos --timeout 0 $(PYTEST_ARGS)

# Old releases warn about newer ones of their own dependencies, so here a warning is no error.
test-lowest: $(LOWEST) $(SERVERS) $(CHROMIUM) $(SLURM)
	.venv-lowest/bin/python -m pytest tests -W default $(TESTS)

test-skypilot: $(INSTALLED) $(PARSER)
	.venv/bin/python -m pytest tests/skypilot -m skypilot $(PYTEST_ARGS)

test-trainers: $(INSTALLED) $(TRAINERS) $(SWIFT)
	.venv/bin/python -m pytest tests/trainers -m trainers $(PYTEST_ARGS)

test-pythons:
	$(PYTHON) .ci/pythons.py

demo: $(INSTALLED)
	$(ALONE) .venv/bin/python examples/glue/demo.py

bench: $(INSTALLED)
	$(ALONE) .venv/bin/python -m benchmarks

# A warning is an error: a broken link, a missing anchor, a page that the menu lacks.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "The site is site/index.html"

clean:
	rm -rf .venv .venv-lowest .venv-skypilot .venv-trainers .venv-swift .venv-docs .venv-pythons .servers build site dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A fresh clone takes minutes here, most of them for torch.
$(INSTALLED): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt is for Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m $(PIP_INSTALL) -c constraints.txt
	@touch $@

$(LOWEST): setup.cfg constraints.txt .ci/lowest.py $(INSTALLED)
	$(PYTHON) -m venv .venv-lowest
	.venv/bin/python .ci/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m $(PIP_INSTALL) -c .venv-lowest/constraints.txt
	@touch $@

$(SERVERS):
	npm install --prefix .servers --no-audit --no-fund --loglevel=error azurite@$(AZURITE) axe-core@$(AXE)
	@touch $@

# 460 MB and half a minute, and click below 8.2: not for make test, and not for .venv.
$(PARSER):
	$(PYTHON) -m venv .venv-skypilot
	.venv-skypilot/bin/python -m pip install --quiet --disable-pip-version-check skypilot==$(SKYPILOT)
	@touch $@

# Beside our tested versions, except where a project excludes one: trackio wants an older pillow, MLflow an older pyarrow.
# Few of the modules are imported, so none is compiled ahead.
INSTALL_WITH := -m pip install --quiet --no-compile --disable-pip-version-check -c
$(TRAINERS): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-trainers
	grep -vE '^(pillow|pyarrow)==' constraints.txt > .venv-trainers/constraints.txt
	.venv-trainers/bin/python $(INSTALL_WITH) .venv-trainers/constraints.txt -e . trl==1.16.0 sentence-transformers==6.2.0 peft \
		mlflow==3.17.2 tensorboard==2.21.0 trackio==0.43.0 wandb==0.31.0 pytest pytest-timeout
	@touch $@

# ms-swift wants transformers < 5.20, peft < 0.21 and trl < 1.0, and what fits these.
$(SWIFT): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-swift
	grep -vE '^(datasets|fsspec|huggingface_hub|peft|transformers)==' constraints.txt > .venv-swift/constraints.txt
	.venv-swift/bin/python $(INSTALL_WITH) .venv-swift/constraints.txt -e . ms-swift==4.6.0
	@touch $@

# Sources are read and not imported, so neither torch nor this package is installed.
$(SITE): docs/site/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/site/requirements.txt -c constraints.txt
	@touch $@

# A browser looks at the pages of `cloudtrain run report` and `cloudtrain ui`; axe-core checks that everyone can use them.
$(CHROMIUM):
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] || { echo "make: Chromium is not installed: sudo apt-get install chromium" >&2; exit 1; }; \
	     apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }
	@mkdir -p $(@D) && touch $@

# The tests start a cluster of their own; no service is started (RUNLEVEL: invoke-rc.d leaves them alone). After the browser,
# because there is one apt-get at a time.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
$(SLURM): | $(CHROMIUM)
	@[ "$$(command -v slurmctld slurmd munged sbatch | wc -l)" = 4 ] \
	|| { [ "$$(id -u)" = 0 ] || { echo "make: Slurm is not installed: sudo apt-get install $(SLURM_PACKAGES)" >&2; exit 1; }; \
	     apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); }
	@mkdir -p $(@D) && touch $@
