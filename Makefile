# Every target sets up what it needs by itself: Python 3.11 or 3.12, make and a network are enough.
#   make PYTHON=python3.12 setup    another Python for a new .venv
#   make ARGS="..." demo            further arguments for the command
#   make ROOT=folder lab            JupyterLab on another folder, whose notebooks/ it opens

PYTHON ?=
ARGS ?=
PEERS ?=
ROOT ?= .
BIN := .venv/bin
STAMP := .venv/.kdlab-setup
# Two processes of one thread each are faster than one of two: most tests are small.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/bench
PEERS_STAMP := .venv-bench/.kdlab-peers

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow browser lab bench peers weights lint lock clean

help:
	@echo "make setup   install into .venv (every other target does it too)"
	@echo "make demo    the whole chain on a small simulated world"
	@echo "make lab     JupyterLab on the notebooks"
	@echo "make test    the tests, without the slow ones"
	@echo "make slow    the slow tests"
	@echo "make browser the notebooks in a real JupyterLab and Chromium, with screenshots"
	@echo "make bench   the benchmarks beside what is installed, one table; PEERS=1: beside all peers"
	@echo "make peers   install the peers into .venv-bench (two compilations, about 25 minutes)"
	@echo "make weights everything in data/weights, from nothing (hours)"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make lock    write requirements.lock anew from pyproject.toml (ARGS=--upgrade for newer versions)"
	@echo "make clean   remove .venv and caches"

setup: $(STAMP)

# The script writes the stamp itself, and only when nothing is missing.
$(STAMP): requirements.lock pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh "$@"

demo: $(STAMP)
	$(BIN)/kdlab demo $(ARGS)

test: $(STAMP)
	$(TEST) -m "not slow and not browser" $(ARGS)

slow: $(STAMP)
	$(TEST) -m "slow and not browser" $(ARGS)

browser: $(STAMP)
	$(BIN)/python -m pytest -m browser -s tests/browser $(ARGS)

# The settings in scripts/lab hold for this start only: no prompt for news, and none to rebuild JupyterLab for an
# extension that open3d brings; open3d's own web viewer, which needs that extension, is off too. Your own settings of
# JupyterLab are read as ever.
lab: $(STAMP)
	OPEN3D_DISABLE_WEB_VISUALIZER=true $(BIN)/jupyter lab --ServerApp.root_dir=$(ROOT) \
	    --LabApp.default_url=/lab/tree/notebooks --LabApp.app_settings_dir=$(CURDIR)/scripts/lab \
	    $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

bench: $(if $(PEERS),$(PEERS_STAMP),$(STAMP))
	$(if $(PEERS),.venv-bench/bin,$(BIN))/python tests/bench/table.py $(ARGS)

peers: $(PEERS_STAMP)

$(PEERS_STAMP): scripts/bench_peers.sh | $(STAMP)
	@PYTHON="$(PYTHON)" sh scripts/bench_peers.sh "$@"

weights: $(STAMP)
	sh scripts/weights.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/uv:
	@$(MAKE) --no-print-directory setup

lock: | $(BIN)/uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-emit-index-url \
	    --custom-compile-command "make lock" $(ARGS) -o requirements.lock pyproject.toml

clean:
	rm -rf .venv .venv-bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
