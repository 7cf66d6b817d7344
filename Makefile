# make demo      NLCG next to AdamW, Momentum, RMSProp and L-BFGS: builds the CPU part, then three minutes
# make test      the tests: seven minutes on two cores, and the set-up
# make test-all  all of them, the thorough ones too
# make sanitize  the tests of memory with AddressSanitizer and UndefinedBehaviorSanitizer in the module
# make hard      fuzzing, kills, mutations and a soak, an hour and a half: a table of figures, into build/hard.json
# make bench     step times next to torch's optimizers, one thread: a table and a picture; matrices next to Muon
# make docs      the documentation, into build/docs, warnings as errors
# make arm       the kernels for aarch64 (needs g++-aarch64-linux-gnu, qemu-user-static): the bits of x86-64
# make lint      ruff, mypy --strict, clang-format
# make cuda      compile the CUDA part for all architectures, warnings as errors, and read its machine code (needs nvcc)
# make gpu       on a machine with a GPU, nvcc and torch, and nothing to download: everything that needs a GPU, into
#                build/gpu.json
# make study     the convergence study on the CPU: make study DATA=folder-of-images (hours; a second call continues)
# make gpu-study its part for a GPU, on a machine as for make gpu: make gpu-study DATA=folder-of-images
# make format    what lint asks for
#
# Everything happens in .venv, which is made when it is missing and brought up to date when the sources have changed. Each
# target installs what it needs and no more. The CUDA part is built if there is a GPU to run it, for that GPU.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc cuda python -type f -not -name '*.pyc' -not -name '*.so') CMakeLists.txt pyproject.toml
EMULATION := $(wildcard tests/emulation/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp cuda/*.h cuda/*.cpp cuda/*.cu cuda/*.cuh tests/*.cpp) $(EMULATION)
CUDA := $(shell nvidia-smi -L > /dev/null 2>&1 && echo AUTO -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native || echo OFF)
BUILD := --no-deps --no-build-isolation -C cmake.define.FASTNLCG_WERROR=ON -C cmake.define.FASTNLCG_CUDA=$(CUDA)

.PHONY: demo test test-all arm sanitize hard bench docs lint cuda gpu study gpu-study format clean
.DELETE_ON_ERROR:

demo: .venv/fastnlcg
	@echo "installing matplotlib, scikit-learn and tqdm, for the demonstration"
	@$(PIP) matplotlib scikit-learn tqdm
	@echo "training: six optimizers, five peaks, five seeds, and a full batch; about three minutes"
	@$(BIN)/python bench/demo.py

# The thorough tests take long for what they add: the comment at their mark says what covers their paths.
# Two workers, one thread each: OpenMP's threads would wait for each other, spinning.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup
test: .venv/emulation
	$(PYTEST) -q -m "not thorough"

test-all: test docs
	$(PYTEST) -q -m thorough

# The library of the aarch64 processor is linked in: none of its system is needed.
arm: .venv/emulation
	@command -v aarch64-linux-gnu-g++ qemu-aarch64-static > /dev/null || \
	  (echo "needs a compiler for aarch64 and its emulator: apt install g++-aarch64-linux-gnu qemu-user-static"; exit 1)
	$(BIN)/python -m pytest -q -n 2 tests/test_bits.py -k aarch64

# Leaks are not looked for: Python itself leaves memory to the end of the process. A GPU's memory is not the sanitizers'.
# Which memory is touched depends on geometry, so the tests of values and of options are left out.
sanitize: .venv/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	  $(BIN)/python -m pytest -q -n 2 --dist loadgroup tests/test_step.py tests/test_ops.py tests/test_ops_arguments.py \
	  tests/test_state.py tests/test_param_groups.py tests/test_properties.py \
	  tests/test_descent.py::test_passes_in_lockstep tests/test_muon.py::test_layouts_in_lockstep -m "not thorough" \
	  -k "not billion and not ranks and not million and not test_options"

hard: .venv/sanitized
	$(PIP) atheris
	$(BIN)/python tests/hard.py

bench: .venv/fastnlcg
	$(PIP) pytest pytest-benchmark pytest-xdist matplotlib
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-json=build/step_cpu.json
	$(BIN)/python bench/step_table.py build/step_cpu.json
	OMP_NUM_THREADS=1 $(BIN)/python bench/matrices.py build/matrices.json
	OMP_NUM_THREADS=2 $(BIN)/python bench/matrices.py build/matrices.json

docs: .venv/emulation .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# What every kernel needs on every architecture goes to build/cuda/resources.txt; spills are reported. The machine code is read
# from the module itself. A core-minute an architecture: make cuda ARCHITECTURES="75-real;120" for some of them.
cuda: .venv/test
	$(PIP) nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
	mkdir -p build/cuda
	$(BIN)/python -m pip install --disable-pip-version-check -v --no-deps --no-build-isolation --upgrade \
	  --target build/cuda/site . -C build-dir=build/cuda/cmake -C build.verbose=true \
	  -C cmake.define.FASTNLCG_CUDA=ON -C cmake.define.FASTNLCG_WERROR=ON \
	  -C cmake.define.CMAKE_CUDA_FLAGS=--resource-usage \
	  $(if $(ARCHITECTURES),-C cmake.define.CMAKE_CUDA_ARCHITECTURES="$(ARCHITECTURES)") > build/cuda/log.txt 2>&1 || (cat build/cuda/log.txt; exit 1)
	grep -E "entry function|bytes spill|registers" build/cuda/log.txt | c++filt > build/cuda/resources.txt
	@echo "$$(grep -c 'entry function' build/cuda/resources.txt) kernels compiled;" \
	  "with spills: $$(grep -cE '[1-9][0-9]* bytes spill' build/cuda/resources.txt), see build/cuda/resources.txt"
	PYTHONPATH=build/cuda/site $(BIN)/python -m pytest -q -n 2 tests/test_sass.py

# With the python of that machine, not .venv's
gpu:
	$(PYTHON) bench/gpu.py

study: .venv/fastnlcg
	$(PIP) matplotlib pillow pytorch-optimizer tqdm
	$(BIN)/python bench/convergence/study.py --data $(DATA) --out build/study --jobs $$(nproc)
	OMP_NUM_THREADS=1 $(BIN)/python bench/convergence/cost.py build/study/cost.jsonl
	$(BIN)/python bench/convergence/plots.py build/study

gpu-study:
	$(PYTHON) bench/gpu.py --only build --out build/gpu-build.json
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/study.py --data $(DATA) --out build/gpu-study \
	  --device cuda --studies gpu
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/cost.py build/gpu-study/cost.jsonl --device cuda --models resnet32
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/plots.py build/gpu-study

clean:
	rm -rf .venv build demo

# ---- what the targets need -------------------------------------------------------------------------------------------

# numpy, torch and what builds the project, at the versions of constraints.txt
.venv/build: pyproject.toml constraints.txt
	@echo "making .venv, with torch: downloads, and a minute"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch numpy scikit-build-core pybind11 cmake ninja
	@touch $@

# the project itself, with warnings as errors
.venv/fastnlcg: .venv/build $(SOURCES)
	@echo "building fastnlcg for the CPU: half a minute (CUDA: $(CUDA))"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(BUILD) .
	@rm -f .venv/emulation
	@$(BIN)/python -m fastnlcg
	@touch $@

.venv/test: .venv/build
	@echo "installing what the tests use"
	@$(PIP) pytest pytest-xdist pytest-cov expecttest hypothesis scikit-learn matplotlib pillow tqdm pytorch-optimizer
	@touch $@

# the same with the CUDA kernels emulated on the CPU, for tests; stands for .venv/fastnlcg too
.venv/emulation: .venv/test $(SOURCES) $(EMULATION)
	@echo "building fastnlcg with the emulation of its CUDA kernels: a minute and a half (CUDA: $(CUDA))"
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(BUILD) -C cmake.define.FASTNLCG_EMULATION=ON .
	@$(BIN)/python -m fastnlcg
	@touch .venv/fastnlcg $@

# the same with sanitizers, in a folder of its own
.venv/sanitized: .venv/emulation
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -C build-dir=build/sanitized-cmake \
	  -C cmake.define.FASTNLCG_SANITIZE=ON -C cmake.define.FASTNLCG_EMULATION=ON -C cmake.define.FASTNLCG_CUDA=OFF \
	  --target build/sanitized --upgrade .
	touch $@

.venv/docs: .venv/test
	@$(PIP) sphinx myst-parser furo nbclient ipykernel accelerate lightning transformers tensorboard build pytest-benchmark
	@touch $@

.venv/lint: .venv/test
	@$(PIP) ruff mypy clang-format check-jsonschema
	@touch $@
