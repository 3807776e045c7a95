# Everything from nothing, in .venv:
#   make train     install, build the quickstart's model and data (once), train on the GPUs there are or on 2 CPU processes, tasks held at their best
#   make test      install, run the tests that CI runs;   make test-all: the slow ones too
# A step that is up to date is skipped.
#   make classify  build a small encoder and three labeled tasks, train a classifier on them
#   make kpe       build the encoder and multiple-choice rows with knowledge, train the adapter on them; make kpe-arms: the comparison
#   make zeroae    build the encoder, the decoder and unlabelled texts of ten topics, classify them; make zeroae-arms: the comparison
#   make bench     beside TRL's SFTTrainer and DPOTrainer, on a machine that nobody else uses: an hour, into benchmarks/results
#   make evidence  every method on a small mixture, several seeds each: hours, into benchmarks/evidence; STUDY=m1 m1-lora m2 m3: the real ones
#   make superglue the same methods on eight tasks and a 0.5B model: a SLURM array for GPUs
#   make train CONFIG=configs/quickstart-equal.yaml     another configuration (also PROCESSES=4, ARGS="--set train.steps=20")
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make train     PyTorch's small CPU build instead of PyPI's CUDA build
#   make merging   what merging is worth, row by row with six seeds: hours, and it goes on where it was
#   make docs      the docs as a site, build/site/index.html; a warning ends it
#   make clean     remove .venv and .venv-bench; models, data and runs stay

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-bench
CONFIG ?= configs/quickstart.yaml
STUDY ?= m0
KIND ?= config
GPUS = $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'))
PROCESSES ?= $(or $(GPUS),2)
ARGS ?=
# A CPU without instructions for bf16 multiplies it tens of times more slowly than fp32; compiling wants a compiler.
FITS = $(if $(GPUS),,$(shell grep -qwE 'amx_bf16|avx512_bf16|bf16' /proc/cpuinfo || echo --set model.precision=fp32)) \
    $(shell command -v $${CXX:-g++} >/dev/null || echo --set model.compile=false)

.PHONY: superglue train quickstart classify kpe kpe-arms zeroae zeroae-arms test test-all docs figure attack bench evidence merging constraints clean

train: quickstart
	$(BIN)/deepspeed --num_gpus $(PROCESSES) launch/train.py --config $(CONFIG) $(FITS) $(ARGS)
	$(BIN)/deepspeed --num_gpus $(PROCESSES) launch/choose.py --config $(CONFIG) $(FITS) \
	    $(filter-out --resume%,$(ARGS))

quickstart: $(VENV)/with-quickstart
	$(BIN)/python launch/quickstart.py

classify: $(VENV)/with-quickstart
	$(BIN)/python launch/quickstart.py --set classification
	$(BIN)/deepspeed --num_gpus $(PROCESSES) launch/train.py --config configs/classification.yaml $(ARGS)

kpe: $(VENV)/with-quickstart
	$(BIN)/python launch/quickstart.py --set kpe
	$(BIN)/deepspeed --num_gpus $(PROCESSES) launch/train.py --config configs/kpe.yaml $(ARGS)

zeroae: $(VENV)/with-quickstart  # resumable
	$(BIN)/python launch/quickstart.py --set zeroae
	$(BIN)/python launch/zeroae.py --config configs/zeroae.yaml --pool .cache/quickstart/zeroae/pool.jsonl \
	    --gold .cache/quickstart/zeroae/pool.gold.jsonl .cache/quickstart/zeroae/test.gold.jsonl $(ARGS)

kpe-arms: $(VENV)/with-quickstart  # resumable; ARGS="--seeds 6 --steps 2000"
	$(BIN)/python launch/quickstart.py --set kpe
	$(BIN)/python benchmarks/kpe.py $(ARGS)

zeroae-arms: $(VENV)/with-quickstart  # resumable; ARGS="--seeds 6"
	$(BIN)/python launch/quickstart.py --set zeroae
	$(BIN)/python benchmarks/zeroae.py $(ARGS)

test: $(VENV)/with-test
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/with-test
	$(BIN)/python -m pytest $(ARGS)

docs: $(VENV)/with-docs
	$(BIN)/python -m mkdocs build --strict

figure: $(VENV)/with-quickstart $(VENV)/with-plot  # of the quickstart's runs that there are
	$(BIN)/python launch/report.py $(wildcard runs/quickstart runs/quickstart-equal runs/quickstart-coba) \
	    --figure docs/quickstart.png

attack: $(VENV)/with-test  # KIND=config|kill|corrupt|disk, ARGS="--tries 10 --seed 1"; CI runs a short form of each
	PYTHONPATH=tests $(BIN)/python tests/attack.py $(KIND) $(ARGS)

evidence: $(VENV)/with-torchjd $(VENV)/with-quickstart $(VENV)/with-plot  # hours; STUDY=m1; stopped, it goes on where it was
	$(BIN)/python launch/quickstart.py --set $(if $(filter m0%,$(STUDY)),strings,$(firstword $(subst -, ,$(STUDY))))
	$(BIN)/python launch/compare.py benchmarks/evidence/$(STUDY).yaml --out benchmarks/evidence/$(STUDY) --page docs/evidence.md $(ARGS)

SUPERGLUE := .cache/superglue

superglue: $(VENV)/with-plot  # eight tasks, GPUs: a SLURM array of every arm and seed; or the same command without --slurm
	@mkdir -p $(SUPERGLUE)
	@test -f $(SUPERGLUE)/combined.zip || curl -fL -o $(SUPERGLUE)/combined.zip https://dl.fbaipublicfiles.com/glue/superglue/data/v2/combined.zip
	@$(BIN)/python examples/superglue.py $(SUPERGLUE)/combined.zip $(SUPERGLUE) >&2
	$(BIN)/python launch/compare.py benchmarks/evidence/superglue.yaml --out benchmarks/evidence/superglue --slurm > superglue.sbatch
	sbatch superglue.sbatch

merging: quickstart  # what merging is worth, six seeds: hours; goes on where it was (ARGS="--studies m0")
	$(BIN)/python launch/quickstart.py --set strings
	$(BIN)/python benchmarks/merging.py $(ARGS)

bench: quickstart $(PEERS)/installed  # ARGS="--groups 'packed fp32'" for a part
	$(BIN)/python benchmarks/bench.py --peer-python $(PEERS)/bin/python $(ARGS)

# What this trainer is measured against, in an environment of its own.
$(PEERS)/installed: benchmarks/constraints.txt | $(BIN)/python
	$(BIN)/python -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c $< trl peft
	@touch $@

# An editable install with one of pyproject.toml's extras.
$(VENV)/with-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)   # $$($$python --version)"; \
	        $$python -m venv $(VENV) && exit; rm -rf $(VENV); exit 1; \
	    fi; \
	done; echo "make: found no Python 3.11 or newer; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1

# Write down the versions that .venv has now: upgrade there what should be newer, run make test-all, then this.
constraints: $(foreach extra,quickstart test plot torchjd qlora,$(VENV)/with-$(extra))
	@{ echo "# The versions CI runs with (Python 3.11); written by make constraints."; \
	   $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//'; } > constraints.txt

clean:
	rm -rf $(VENV) $(PEERS)
