# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= demo/phantoms
OUT ?= demo/$(notdir $(DATA))
MERISTEM_DATA ?= ../shared/data

JOBS ?= 2
KILLS ?= 100
SECONDS ?= 600
HARNESSES ?= chaos fuzz round_trips canaries golden
OFFLINE ?= .venv-offline
HASHES ?= yes

.PHONY: demo test chaos fuzz canaries golden trust lock wheels offline audit bench bench-graphs bench-detection bench-systems \
    bench-transfer

# pretrain on unlabelled scans, fine-tune on few and on all labels beside a scratch arm of equal budget, write one report
demo: .venv/ready
	@if [ "$(DATA)" = demo/phantoms ] && [ ! -d $(DATA) ]; then $(BIN)/python -m meristem.modalities.volume.phantom $(DATA); fi
	@if ! grep -q '"stopped_early": false' $(OUT)/pretrained/metrics.json 2>/dev/null; then \
	    $(BIN)/meristem pretrain volume/mae-unet --data $(DATA) --out $(OUT)/pretrained train.steps=250 \
	        $$([ -d $(OUT)/pretrained ] && echo --resume); fi
	$(BIN)/meristem evaluate segmentation --data $(DATA) --init $(OUT)/pretrained --labels 5 --labels all --seeds 2 \
	    --out $(OUT)/report train.steps=120

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

# trainings of each modality, disturbed at random moments and resumed, must end as undisturbed ones: one JSON line of counts
chaos: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --kills $(KILLS) $(ARGS)

# broken and hostile files for every reader: each is read or refused in words; ARGS="--target NAME" for one; a line of counts
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) $(ARGS)

# words planted in names and headers of files of each kind must be in nothing that comes out: one JSON line of counts
canaries: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/canaries.py $(ARGS)

# tiny seeded trainings against the numbers stored in tests/golden; ARGS=--renew stores new ones
golden: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/golden.py $(ARGS)

# every harness, then docs/trust.md of their counts; HARNESSES="canaries golden" for some
trust: .venv/ready
	for harness in $(HARNESSES); do OMP_NUM_THREADS=1 $(BIN)/python tests/$$harness.py --out docs/trust/$$harness.json || exit 1; done
	$(BIN)/python tests/trust.py

# requirements/locked.txt anew: the versions of constraints.txt with the hashes of their files, for all platforms
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --constraint constraints.txt \
	    --generate-hashes --no-header --no-annotate --quiet --output-file requirements/locked.txt

# 3 GB of wheels for a machine without network, and, there, an environment made of nothing else
wheels: .venv/ready
	$(BIN)/pip wheel --quiet --no-deps --require-hashes --requirement requirements/locked.txt --wheel-dir wheels
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels .

offline:
	$(PYTHON) -m venv $(OFFLINE)
	$(OFFLINE)/bin/pip install --quiet --no-index --find-links wheels --require-hashes --requirement requirements/locked.txt
	$(OFFLINE)/bin/pip install --quiet --no-index --find-links wheels --no-deps meristem
	$(OFFLINE)/bin/meristem recipes list --status verified

# known vulnerabilities of the locked versions; asks a public database
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --require-hashes --disable-pip --requirement requirements/locked.txt

# every comparison with a peer or a plain way, and docs/performance.md from them; ARGS="peers" for some, "--quick" for less
bench: .venv/ready
	$(BIN)/python benchmarks/performance.py $(ARGS)

# each graph set beside random weights and the published figure: hours on a CPU; ARGS="--quick --sets mutag" for less
bench-graphs: .venv/ready
	$(BIN)/python benchmarks/graphs.py --memory --data $(MERISTEM_DATA) $(ARGS)

# a detector of blood cells, pretrained and from random weights, at 10 % and at all labels: ARGS="--quick" for a tenth of it
bench-detection: .venv/ready
	$(BIN)/python benchmarks/cells.py --data $(MERISTEM_DATA)/bccd/BCCD $(ARGS)

# every published system beside random weights and the plain method: hours on a CPU; ARGS="cae mfm" for some, docs/systems.md
bench-systems: .venv/ready
	$(BIN)/python benchmarks/systems.py --data $(MERISTEM_DATA) $(ARGS)
	$(BIN)/python benchmarks/systems.py --table

# grids of arms, label budgets, protocols and seeds on real data of several kinds: hours on a CPU; docs/transfer.md
bench-transfer: .venv/ready
	$(BIN)/python benchmarks/transfer.py --data $(MERISTEM_DATA) $(ARGS)

# every file by its hash; HASHES=no takes the same versions unchecked, where a platform has to build some of its own
.venv/ready: pyproject.toml constraints.txt requirements/locked.txt
	$(PYTHON) -m venv .venv
ifeq ($(HASHES),yes)
	$(BIN)/pip install --quiet --require-hashes --requirement requirements/locked.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
endif
	touch $@
