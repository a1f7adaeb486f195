# `make` prints what there is to do.
VENV ?= .venv
PYTHON ?=
ARGS ?=
SCALE ?= mini
HARDWARE ?= auto

BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo table1 table2 table3 table4 memory-table figures report docs screenshot test lint format oldest-torch sanitize sanitize-gpu fuzz soak benchmark studies clean

help:  ## print this
	@awk -F ':.*## *' '/^[a-z0-9-]+:.*##/ { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  SCALE=mini|paper|smoke HARDWARE=auto|cpu|a100_80gb|...   for table1 to table4, with"
	@echo "  DRY=1        only plan: which runs exist, which are missing, their time and memory"
	@echo "  FRESH=1      do all runs again (when interrupted, it prints how to resume)"
	@echo "  JOBS=2       two runs at a time on this machine, which share its cores"
	@echo "  LAUNCHER=... of Hydra, such as submitit_slurm: runs side by side on a cluster"
	@echo "  ARGS=...   extra arguments for demo, test, sanitize, studies, e.g. make test ARGS='-k layout -x'"
	@echo "  PYTHON=... interpreter for the environment (3.10 to 3.13; default: the first that is found)"
	@echo "  VENV=...   the environment to make or to use (now: $(VENV))"

setup:  ## make the environment in .venv: Python packages, and Debian packages if permitted (a second when up to date)
	@VENV='$(VENV)' PYTHON='$(PYTHON)' scripts/setup.sh

demo: setup  ## fine-tune a small language model with MicroAdam and print the results
	$(BIN)/python run.py optimizer=microadam task=gsm8k $(ARGS)

table1: setup  ## MNLI: does the missing runs, then writes results/table1.{md,csv,tex}
table2: setup  ## the same for GSM8K
table3: setup  ## the same for Open-Platypus; at mini scale, other instructions
table4: setup  ## the same for ImageNet; at mini scale, CIFAR-10
table1 table2 table3 table4:
	$(BIN)/python -m scripts.table $@ --scale $(SCALE) --hardware $(HARDWARE) \
	  $(if $(JOBS),--jobs $(JOBS)) $(if $(LAUNCHER),--launcher $(LAUNCHER)) $(if $(filter-out 0,$(DRY)),--dry) \
	  $(if $(filter-out 0,$(FRESH)),--fresh $(filter-out 1,$(FRESH)))

memory-table: setup  ## memory of the paper's models with eight optimizers: planned, and measured where a GPU did
	$(BIN)/python -m scripts.memory_plan
	$(BIN)/python -m experiments.report memory

figures: setup  ## all figures of what is in results/, into results/figures
	$(BIN)/python -m experiments.report figures

report: setup  ## figures and one page with everything: results/index.html
	$(BIN)/python -m experiments.report

docs: setup  ## the documentation as a site, build/docs/index.html; a dead link or reference fails
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs

screenshot: report  ## the page as a picture, for the README (needs chromium)
	scripts/screenshot.sh

test: setup  ## run the tests (9 minutes on 2 cores; needs no GPU and no network)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: setup  ## ruff, mypy, and clang-format over csrc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup  ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

oldest-torch: setup  ## compile the native step against the oldest torch that is supported (80 MB to download)
	PYTHON=$(BIN)/python scripts/oldest_torch.sh

sanitize: setup  ## run the native core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	MICROADAM_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest -o pythonpath="build/sanitize/lib ." tests/microadam/test_native.py $(ARGS)

sanitize-gpu: setup  ## run the GPU tests under compute-sanitizer
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest -m gpu tests/microadam/test_gpu.py -k 'agree or hard' || exit 1; done

fuzz: setup  ## random steps, the native core against plain torch, 10 minutes
	$(BIN)/python -m tests.microadam.fuzz_native --minutes 10

soak: setup  ## kill runs at 100 random moments and compare how they end, into results/
	nice -n 10 $(BIN)/python -m tests.experiments.soak

benchmark: setup  ## step time and state memory of the optimizers, image loading; on an idle machine, into results/
	$(BIN)/python -m benchmarks.step
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m benchmarks.step --optimizers 'AdamW (fused)' MicroAdam \
	  --output results/benchmark_step_cpu_avx2
	$(BIN)/python -m benchmarks.step --optimizers 'AdamW (fused)' MicroAdam --models '200 x 16' '200 x 768' \
	  --rounds 400 --output results/benchmark_step_small
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.loading

studies: setup  ## run the studies again, into results/studies/ (about 5 minutes on an idle core)
	$(BIN)/python -m experiments.studies all $(ARGS)

clean:  ## remove what was built and cached; the environment and all results stay (make setup builds again)
	rm -rf microadam/_native.so $(VENV)/setup.stamp build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find microadam experiments tests -name __pycache__ -prune -exec rm -rf {} +
