# Every target makes the virtual environment first; see README.md.
#   PYTHON     the interpreter that makes it; the newest tested one that is there and can
#   PIP_FLAGS  options for pip, such as the index of torch's CPU builds
PYTHON ?= $(or $(firstword $(foreach version,3.13 3.12 3.11,$(shell \
	python$(version) -c "import ensurepip" 2> /dev/null && echo python$(version)))),python3)
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help venv test check demo learn bench clean

help:
	@echo "make demo    train a small METRO-LM on real text and fine-tune it (at most 15 minutes on 2 cores)"
	@echo "make learn   the same path, sized for 10 minutes of one GPU or a night on a CPU"
	@echo "make bench   measure operators and whole steps on one GPU (9 minutes); see docs/benchmarks.md"
	@echo "make test    all tests"
	@echo "make check   lint, types, import arrows"
	@echo "make clean   remove caches; runs/ and .venv stay"

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

demo: $(STAMP)
	$(BIN)/python -m tools.demo.run --preset demo --output runs/demo

learn: $(STAMP)
	$(BIN)/python -m tools.demo.run --preset learn --output runs/learn

# Steps are measured, too, where an operator is wrong; the exit code then says so.
bench: $(STAMP)
	result=0; \
	$(BIN)/python -m tools.bench.bench_fused --budget_s 330 || result=$$?; \
	$(BIN)/python -m tools.bench.bench_train --config examples/base.yaml --table5 --warm_up 2 --steps 5 --budget_s 150 \
		|| result=$$?; \
	exit $$result

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
