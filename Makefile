# Everything runs in one virtual environment; `make venv` makes it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
GLUE ?=

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test test-all test-testbed test-arm64 check mutants matrix migration bench figures compare evidence attacks testbed docs clean

venv: $(VENV)/.installed

# torch comes first and pinned, so that nothing pulls another build of it afterwards.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt \
	  --editable '.[simulation,glue,adapters,offline,figures,docs,dev]'
	touch $@

demo: venv
	$(BIN)/lola-flwr simulate simulations/glue --devices 6 batch-size=auto codec=auto downlink=changed downlink-codec=int2 downlink-channel=broadcast own-examples=0 eval-every=2 'target="accuracy>=0.83"'

# For two cores: most tests compute on one, and some wait for Flower's programs.
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# As root, with network namespaces: real SuperNodes over shaped links.
test-testbed: venv
	$(BIN)/python -m pytest -m testbed tests/testbed

# As root: the kits on an arm64 Debian, which qemu emulates (docs/deployment.md). The Debian
# is kept in LOLA_ARM64_DIR (/var/cache/lola-flwr-arm64), 2 GB.
test-arm64: venv
	$(BIN)/python -m pytest -n 0 -m arm64 tests/arm64

test-all: venv
	$(BIN)/python -m pytest -m 'not testbed and not arm64'

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.audit

# What of the core its own tests do not notice being changed. MUTANTS=--again: of those.
mutants: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(MUTANTS)

# The wheel beside the oldest and the newest of what it needs; some GB for each.
matrix: venv
	$(BIN)/python -m tests.matrix

# FedAvg projects beside what docs/migration.md makes of them: more than an hour on two cores.
# MIGRATION='--only NAME': of one project; --seeds 1: of one seed.
migration: venv
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fedavg_apps $(MIGRATION)

bench: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest simulations/benchmarks -o python_files='bench_*.py'

# The paper's figures. GLUE=DIR adds learning curves on SST-2 and CoLA. For a paper's column:
# FIGURES='--format pdf --style paper'.
figures: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.figures --out runs/figures $(if $(GLUE),--glue $(GLUE)) $(FIGURES)

# Every method side by side (docs/methods.md). COMPARE passes options on: see --help.
compare: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.compare --out runs/compare $(COMPARE)

# CoLA, MRPC and SST-2 beside FedAvg, three seeds (docs/measured.md); it goes on where it was
# stopped. EVIDENCE='--tasks mrpc --seeds 1', '--format pdf --style paper'.
evidence: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.evidence --out runs/evidence $(if $(GLUE),--glue $(GLUE)) $(EVIDENCE)

# What hostile devices do to a run (docs/security.md). ATTACKS='--seeds 1 --shares 0.2',
# '--model minilm', '--method d2ft'.
attacks: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.attacks --out runs/attacks $(ATTACKS)

# Measured beside predicted uploads under several allocators; skips where it cannot run.
testbed: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.testbed --out runs/testbed
# The documentation as a site: build/site/index.html.
docs: venv
	$(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

clean:
	rm -rf $(VENV) runs build dist *.egg-info
