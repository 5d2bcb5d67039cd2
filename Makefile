# The one way to build, check and show the project; a person, a hook and CI run the same targets.
#
# Needs make and Python 3.11 to 3.13 with venv, nothing else. The environment lives in .venv: pinned and hash-checked by
# requirements.lock, built once, and again only when the lock changes.

PYTHON  ?= python3
UV      ?= uv
WORKERS ?= 2
ARGS    ?=

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.project-installed
# Idle workers take tests from busy ones; the slowest are named at the end.
TESTS := -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 40
PEER  := .venv-peer
# Environments of `make compat`, oldest first, and the Python of each; COMPAT="oldest middle" leaves one out.
COMPAT ?= oldest middle newest
PYTHON_oldest := 3.11
PYTHON_middle := 3.12
PYTHON_newest := 3.13
PIP   := -m pip --disable-pip-version-check --no-input
APT   := DEBIAN_FRONTEND=noninteractive apt-get -y -qq --no-install-recommends -o DPkg::Lock::Timeout=60 \
  -o Acquire::http::Timeout=20 -o Acquire::Retries=1
# The user's own PYTHONPATH or an active environment must not leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# An environment knows the folder it was built in: in a moved or copied tree it is built anew.
MOVED := $(if $(filter-out $(CURDIR),$(file <$(VENV)/.folder)),moved)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment check test lint browser format demo demo-parties soak planted compat fault-matrix bench peer lock clean distclean
.PHONY: moved $(COMPAT:%=compat-%)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

environment: $(READY) ## build .venv, with the `tapeline` command

moved:

$(VENV)/.locked: requirements.lock $(MOVED)
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' here; install Python 3.11, 3.12 or 3.13, or say: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("make: needs Python 3.11, 3.12 or 3.13; " + sys.executable + " is " + sys.version.split()[0] + "; say: make PYTHON=/path/to/python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' has no venv module; install it (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install -qq --only-binary :all: --require-hashes -r requirements.lock
	@echo "$(CURDIR)" > $(VENV)/.folder
	@touch $@

$(READY): $(VENV)/.locked pyproject.toml
	$(BIN)/python $(PIP) install -qq --no-deps --no-build-isolation --editable .
	@$(BIN)/python $(PIP) check || { echo "make: requirements.lock does not fit pyproject.toml; say: make lock" >&2; exit 1; }
	@touch $@

check: $(READY) lint ## before every commit, five minutes: lint, types, the tests that find most of what breaks
	$(BIN)/python $(TESTS) -m "not gate and not soak" --hypothesis-profile check $(ARGS)

test: $(READY) lint browser ## the gate, fifteen minutes: lint, types, tests
	$(BIN)/python $(TESTS) $(ARGS)

lint: $(READY) ## ruff and mypy, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser: ## the Chromium of the browser tests, where it may be installed; they are skipped without one
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	without() { echo "make: $$1: the browser tests will be skipped" >&2; exit 0; }; \
	command -v apt-get >/dev/null || without "no chromium with chromedriver here, and no apt-get"; \
	[ "$$(id -u)" = 0 ] || without "no chromium here, and only root may: apt-get install chromium chromium-driver"; \
	echo "make: installing chromium and chromium-driver for the browser tests"; \
	log=$$(timeout --kill-after=10 300 sh -c '$(APT) update && $(APT) install chromium chromium-driver' \
	  </dev/null 2>&1) || without "chromium could not be installed within 300 s ($$(echo "$$log" | tail -n 1))"

format: $(READY) ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY) ## train the digits over three processes, verify, draw the timeline
	$(BIN)/tapeline demo $(ARGS)

demo-parties: $(READY) ## train one model in three organisations' processes, and compare with one tape
	$(BIN)/python examples/parties.py

soak: $(READY) browser ## every test there is with many more examples, and coverage with the worker processes
	@$(BIN)/coverage erase
	@status=0; \
	$(BIN)/coverage run $(TESTS) -m "" --hypothesis-profile soak --timeout 3600 $(ARGS) || status=$$?; \
	$(BIN)/coverage combine --quiet || status=1; \
	$(BIN)/coverage report || status=1; \
	exit $$status

planted: $(READY) ## plant faults in copies of the sources and print docs/planted-faults.md (an hour)
	$(BIN)/python -m tests.planted $(ARGS)

compat: $(COMPAT:%=compat-%) ## the core tests with the oldest TensorFlow and Keras that will do, with a middle and the newest

# The core tests that need no mark, then the command of the demo, which trains, verifies and writes the report page.
# What libraries deprecate among each other, in versions of different years, is no fault of ours.
$(COMPAT:%=compat-%): compat-%: .venv-compat-%/.installed
	@echo "make: the core tests with $*: $$(.venv-compat-$*/bin/python $(PIP) freeze | grep -Ei '^(tensorflow|keras|numpy)==' | xargs)"
	.venv-compat-$*/bin/python $(TESTS) -m "not gate and not soak" --hypothesis-profile check \
	  -W ignore::DeprecationWarning -W ignore::FutureWarning @tests/compat/core.txt $(ARGS)
	.venv-compat-$*/bin/tapeline demo --output artifacts/compat-$*

$(COMPAT:%=.venv-compat-%/.installed): .venv-compat-%/.installed: tests/compat/%.txt tests/compat/tools.txt requirements.lock pyproject.toml
	@version=$(PYTHON_$*); \
	for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python $(PYTHON); do \
	  "$$python" -c "import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null || continue; \
	  rm -rf .venv-compat-$*; exec "$$python" -m venv .venv-compat-$*; \
	done; \
	echo "make: no Python $$version with venv here, for the environment '$*'; install it, or leave '$*' out: make compat COMPAT='...'" >&2; exit 1
	.venv-compat-$*/bin/python $(PIP) install -qq --only-binary :all: -r $<
	.venv-compat-$*/bin/python $(PIP) install -qq --no-deps --no-build-isolation --editable .
	.venv-compat-$*/bin/python $(PIP) check
	@touch $@

fault-matrix: $(READY) ## put every fault into running pipelines and print docs/fault-matrix.md (half an hour)
	$(BIN)/python -m tests.faults $(ARGS)

bench: $(READY) ## the table of benchmarks/README.md; with the peer if `make peer` was said
	$(BIN)/python benchmarks/run.py $(if $(wildcard $(PEER)/.locked),--python $(PEER)/bin/python) $(ARGS)

peer: $(PEER)/.locked ## build .venv-peer, the PyTorch that `make bench` compares with

$(PEER)/.locked: benchmarks/peer-requirements.txt
	rm -rf $(PEER)
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python $(PIP) install -qq -r $<
	@touch $@

lock: ## resolve pyproject.toml anew into requirements.lock (needs uv)
	$(UV) pip compile --quiet --universal --generate-hashes --fork-strategy fewest --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command "make lock" --extra dev --extra examples \
	  $(ARGS) --output-file requirements.lock pyproject.toml

clean: ## remove caches, reports and artefacts
	rm -rf artifacts build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pipeline stages transport tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the environments
	rm -rf $(VENV) $(PEER) .venv-compat-*
