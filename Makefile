# Every target makes the virtual environment first; see README.md.
#   PYTHON     the interpreter that makes it; the newest tested one that is there and can
#   PIP_FLAGS  options for pip, such as the index of torch's CPU builds
#   JOBS       how many tests, or runs of `make learn`, go on beside each other
#   SIZE       of the checkpoint that `make bench-checkpoint` saves and loads: demo, larger or base
#   MODEL      the exported folder that `make citizen` checks
#   FAULTS     how many of them `make storm` has come over its runs, and OUTPUT, where it goes on
PYTHON ?= $(or $(firstword $(foreach version,3.13 3.12 3.11,$(shell \
	python$(version) -c "import ensurepip" 2> /dev/null && echo python$(version)))),python3)
PIP_FLAGS ?=
JOBS ?= 2
SIZE ?= larger
MODEL ?= runs/demo/model
FAULTS ?= 300
OUTPUT ?= runs/storm
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help venv test test-all fuzz check demo learn figure3 ledger bench wheels bench-cpu bench-checkpoint bench-start zoo storm parity citizen clean

help:
	@echo "make demo    train a small METRO-LM on real text and see what it learned (8 minutes on 2 cores; MINUTES=)"
	@echo "make figure3 train METRO's Figure 3 in miniature and draw it (5 to 20 minutes on 2 cores)"
	@echo "make learn   pretrain METRO, ELECTRA, MLM and others at equal FLOPs, run by run (nights on 2 cores); resumes"
	@echo "make ledger  write docs/ledger.md: the papers' tables and figures beside what is computed here"
	@echo "make bench   test, check and measure on one GPU (9 minutes); resumes; see docs/benchmarks.md"
	@echo "make wheels  collect what a GPU machine without a package index needs for benchmarks/bare.sh"
	@echo "make bench-cpu  measure the CPU step beside plain torch (5 to 10 minutes on 2 cores)"
	@echo "make bench-checkpoint  measure saving and loading beside the disk alone (1 minute; SIZE=base 4)"
	@echo "make bench-start  measure a rank's start beside its imports (3 minutes)"
	@echo "make test    a test of everything (12 minutes on 2 cores)"
	@echo "make test-all  the other tests: more layouts, shapes and examples of the same (14 to 17 more)"
	@echo "make fuzz    damage files of every kind: refused in a line, or read as they are (5 minutes on 2 cores)"
	@echo "make zoo     plant faults into tiny runs and see which are named (10 to 17 minutes of one core)"
	@echo "make parity  each of 540 ways to spread a run against one process (hours on 2 cores, 16 GB); resumes"
	@echo "make storm   disturb tiny runs FAULTS=300 times: what comes out must be equal (15 minutes of 2 cores); resumes"
	@echo "make citizen check an exported folder with the libraries that its users have (1 minute; MODEL=FOLDER)"
	@echo "make check   lint, types, import arrows"
	@echo "make clean   remove caches; runs/ and .venv stay"

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch and the others into .venv, one to three minutes"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

# Each of the JOBS takes a run of files, then tests from another's end: fixtures of files are made once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(STAMP)
	$(PYTEST) -m "not long"

test-all: $(STAMP)
	$(PYTEST) -m long

fuzz: $(STAMP)
	FUZZ=1000 FLIPS=10000 $(PYTEST) --timeout=7200 tests/fuzz tests/inspection/test_flips.py tests/text/test_documents.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

demo: $(STAMP)
	$(MAKE) -j2 --no-print-directory -f tools/demo/demo.mk BIN=$(BIN)

figure3: $(STAMP)
	$(MAKE) -j2 --no-print-directory -f tools/figure3/figure3.mk BIN=$(BIN)

learn: $(STAMP)
	$(MAKE) --no-print-directory -f tools/campaign/campaign.mk BIN=$(BIN)

ledger: $(STAMP)
	$(BIN)/python -m tools.ledger.ledger

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_gpu

zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.zoo

parity: $(STAMP)
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.parity.matrix --output runs/parity.jsonl

storm: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tools.storm.storm --faults $(FAULTS) --output $(OUTPUT) \
		--results docs/results/storm.md

.venv/citizen: $(STAMP)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e ".[citizen]"
	touch $@

citizen: .venv/citizen
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tools.citizen.citizen --model $(MODEL)

# For Python 3.12 on x86-64: what bench_gpu and tests/fused import beside the packages that docs/benchmarks.md lists. The
# releases are those of constraints.txt.
WHEELS := megatron-core orjson zstandard isal hypothesis sortedcontainers pytest-timeout pytest-xdist execnet
PLATFORMS := $(foreach glibc,28 24 17,--platform manylinux_2_$(glibc)_x86_64)

wheels: $(STAMP)
	rm -rf $@
	$(BIN)/python -m pip download $(PIP_FLAGS) -q --no-deps --only-binary=:all: --python-version 3.12 $(PLATFORMS) \
		-c constraints.txt -d $@ $(WHEELS)

bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks.bench_cpu --output docs/benchmarks/cpu

bench-checkpoint: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.bench_checkpoint --size $(SIZE) \
		--output docs/benchmarks/checkpoint_$(SIZE)

bench-start: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.bench_start --output docs/benchmarks/start

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
