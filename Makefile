# Two commands from a bare checkout: `make demo` and `make test`. All of it lives in .venv and runs/; as root, `lab`
# also installs Debian packages. `make test FAST=1` is for work in progress: what needs neither NeMo nor Slurm.
PYTHON ?= python3.11
BIN := .venv/bin
SCRIPTS := .ci/run $(wildcard docker/*.sh slurm/*.sh tests/slurm/*.sh tests/browser/*.sh)
INSTALLED := .venv/.installed
FAST_TESTS := $(if $(filter-out 0,$(FAST)),tests/unit tests/multirank)

.PHONY: setup lab check test demo study bench
.NOTPARALLEL:

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints-cpu.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[demo,verify,evaluate,test,bench,compile,wandb,mlflow]'
	touch $@

# The Slurm lab of tests/slurm and the browser of tests/browser are Debian packages; without root and them, the tests
# there skip and say so.
lab:
	if [ "$$(id -u)" = 0 ] && ! { command -v slurmctld && test -e /usr/include/slurm/spank.h; } > /dev/null; then tests/slurm/install.sh; fi
	if [ "$$(id -u)" = 0 ] && ! command -v chromium > /dev/null; then tests/browser/install.sh; fi

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck --severity=warning $(SCRIPTS)

test: setup $(if $(FAST_TESTS),,lab) check
	$(BIN)/pytest $(FAST_TESTS)

demo: setup
	$(BIN)/python -W 'ignore:The pynvml package' -m nemo_tsdkd.demo.run

# STUDY=smoke tries the flow in a minute; the full study takes two cores some two hours, in parts if need be.
study: setup
	$(BIN)/python -W 'ignore:The pynvml package' -m benchmarks.study --setting $(or $(STUDY),full)

bench: setup
	mkdir -p runs/benchmarks
	set -e; for file in benchmarks/*.py; do \
	  $(BIN)/python "$$file" --json "runs/benchmarks/$$(basename "$$file" .py).json"; \
	done
