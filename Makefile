# Two commands for a fresh machine: `make quickstart` and `make test`. Everything goes into .venv and can be deleted with
# `make clean`. pip's own settings (index, proxy, certificates: PIP_* and pip.conf) are honored.
#
#   PYTHON=python3.12            which Python makes the environment
#   TORCH_INDEX=URL              package index for torch alone, e.g. PyTorch's own for CPU-only builds (see README)
#   ARGS="--open --seed 1"       passed on to `edgeprune quickstart`

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: quickstart test test-together test-quickstart test-types test-boards nightly dist clean sshd few-boards

PYTHON ?= python3
export VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
# pip compiles one file after another, which takes half of its time; this takes every core. What does not compile is not ours.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
STAGE := .ci/stage

quickstart: $(VENV)/package.stamp
	$(BIN)/edgeprune quickstart $(ARGS)

$(VENV)/torch.stamp: constraints.txt
	@.ci/check-python $(PYTHON)
	@# Without pip it is what an interrupted attempt left; only what is an environment is ever cleared.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	@echo "edgeprune: installing into $(VENV) what is not there yet:"
	@echo "  $(TORCH): about 200 MB as a CPU build, several GB where the index offers only a CUDA build"
	@echo "    (CPU only: see \"A CPU-only torch\" in the README)"
	@echo "  ONNX Runtime, scikit-learn, pandas, plotly and others, pinned in constraints.txt: about 250 MB"
	$(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) $(INSTALL) "$(TORCH)"
	@$(COMPILE)
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) --quiet -c constraints.txt -e '.[onnxruntime]'
	@$(COMPILE)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(INSTALL) --quiet -c constraints.txt -e '.[onnxruntime,dev]'
	@$(COMPILE)
	@touch $@ $(VENV)/package.stamp

sshd:
	@.ci/need-sshd

few-boards: sshd
	@.ci/need-boards few

test: sshd few-boards
	@rm -f $(VENV)/stages
	@$(STAGE) set-up $(MAKE) --no-print-directory $(VENV)/dev.stamp
	@$(STAGE) ruff $(BIN)/ruff check .
	@$(STAGE) format $(BIN)/ruff format --check .
	@$(STAGE) imports $(BIN)/lint-imports --no-logo
	@# Several at a time with a thread each, beside them mypy and the long run of the quickstart, which times nothing;
	@# then those that nothing may run beside.
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target test-types test-together test-quickstart
	@$(STAGE) alone env EDGEPRUNE_REQUIRE_SSHD=1 .ci/pytest alone -m "not slow and alone" --durations=25
	@cat $(VENV)/stages

test-types:
	@$(STAGE) mypy $(BIN)/mypy

test-together:
	@$(STAGE) tests env EDGEPRUNE_REQUIRE_SSHD=1 OMP_NUM_THREADS=1 .ci/pytest tests \
		-m "not slow and not alone" --ignore=tests/quickstart -n auto --maxprocesses=4 --dist=worksteal --durations=25

test-quickstart:
	@$(STAGE) quickstart env EDGEPRUNE_REQUIRE_SSHD=1 OMP_NUM_THREADS=1 .ci/pytest quickstart -m "not slow" tests/quickstart

# Test boards that are no toys, as root: dropbear, hosts behind a bastion in network namespaces, an emulated arm64 Debian.
# EDGEPRUNE_TEST_CACHE=DIR keeps that Debian (300 MB) for the next run; EDGEPRUNE_REQUIRE_BOARDS=1 lets what is missing fail.
test-boards: sshd $(VENV)/dev.stamp $(VENV)/tvm.stamp
	@.ci/need-boards all
	@$(STAGE) boards env EDGEPRUNE_REQUIRE_SSHD=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/boards --durations=20

$(VENV)/tvm.stamp: $(VENV)/dev.stamp
	$(INSTALL) --quiet -c constraints.txt -e '.[tvm]'
	@$(COMPILE)
	@touch $@

nightly: sshd $(VENV)/dev.stamp $(VENV)/tvm.stamp
	@$(STAGE) tvm env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" tests/unit/backends --durations=10
	@$(STAGE) slow env EDGEPRUNE_REQUIRE_SSHD=1 $(BIN)/python -m pytest -q -m "slow and not boards" --durations=20

dist: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	@ls -l dist

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
