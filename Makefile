# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= demo/phantoms
OUT ?= demo/$(notdir $(DATA))
MERISTEM_DATA ?= ../shared/data

KILLS ?= 100
SECONDS ?= 600

.PHONY: demo test chaos fuzz bench bench-graphs bench-detection bench-systems bench-transfer

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
	$(BIN)/pytest

# trainings of each modality, disturbed at random moments and resumed, must end as undisturbed ones: one JSON line of counts
chaos: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --kills $(KILLS) $(ARGS)

# broken and hostile files for every reader: each is read or refused in words; ARGS="--target NAME" for one; a line of counts
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) $(ARGS)

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

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
