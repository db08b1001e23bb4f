# Everything here starts from git, make and Python alone: each target makes the environment it needs in .venv.
#
#   make demo      plan the example transformer for four stages, train it, and show how even it was
#   make install   evenstage and its three commands, in .venv/bin
#   make test      the tests, two files at a time
#   make slow      the notebooks executed, the examples trained until they have learned
#   make zoo       every model of the zoo planned and trained, the table in docs/zoo.md
#   make exhaustive  what takes half an hour: every model of the zoo again as tests, a model larger than its limit
#   make lint      style, types and the order of the modules
#   make clean     remove the environment and all that was produced

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

DEMO := $(BIN)/plan --gpus 4 examples/transformer.py --train --steps 60 --run-dir runs/demo

.PHONY: demo install test slow zoo exhaustive lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(DEMO)

install: $(VENV)/.installed

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow and not exhaustive" -n 2 --dist loadfile

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

exhaustive: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m exhaustive

zoo: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.zoo

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras. The installation is editable, so only a change of pyproject.toml renews it.
$(VENV)/.installed: EXTRAS =
$(VENV)/.installed-demo: EXTRAS = [examples,tensorboard]
$(VENV)/.installed-test: EXTRAS = [test]
$(VENV)/.installed $(VENV)/.installed-demo $(VENV)/.installed-test: pyproject.toml $(VENV)/.torch
	@echo "installing evenstage$(EXTRAS) into $(VENV)"
	@$(PIP_INSTALL) --editable ".$(EXTRAS)"
	@touch $@

# torch comes first and apart: which build is right depends on the machine.
$(VENV)/.torch: tools/install_torch.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("evenstage needs Python 3.11 or newer, but $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install_torch.py
	@touch $@
