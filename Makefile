# make demo    NLCG beside Momentum, RMSProp and SGD on real images (two minutes, and the set-up)
# make test    the whole test suite
# make sanitize   the native tests with AddressSanitizer and UndefinedBehaviorSanitizer in the module
# make hard    fuzzing, kills, sabotage and a soak, 40 minutes: a table of figures, into build/hard.json
# make bench   step times beside torch's optimizers, one thread: a table and a picture
# make docs    the documentation, into build/docs, warnings as errors
# make lint    ruff, mypy --strict, clang-format
# make cuda    compile the CUDA part for all architectures, warnings as errors (needs nvcc)
# make gpu     on a machine with a GPU, nvcc and torch, and nothing to download: everything that needs a GPU, into
#              build/gpu.json
# make study   the convergence study on the CPU: make study DATA=folder-of-images (hours; goes on where it was cut off)
# make gpu-study   its part for a GPU, on a machine as for make gpu: make gpu-study DATA=folder-of-images
# make format  what lint asks for
#
# Everything happens in .venv, which is made when it is missing and brought up to date when the sources have changed.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc cuda python tests/emulation -type f -not -name '*.pyc' -not -name '*.so') CMakeLists.txt pyproject.toml
TOOLS := scikit-build-core pybind11 cmake ninja numpy pytest pytest-benchmark expecttest hypothesis accelerate lightning transformers tensorboard sphinx myst-parser furo \
         nbclient ipykernel build check-jsonschema scikit-learn matplotlib tqdm pillow pytorch-optimizer \
         ruff mypy clang-format nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
CPP := $(wildcard csrc/*.h csrc/*.cpp cuda/*.h cuda/*.cpp cuda/*.cu cuda/*.cuh tests/emulation/*)

.PHONY: demo test sanitize hard bench docs lint cuda gpu study gpu-study format clean
.DELETE_ON_ERROR:

demo: .venv/fastnlcg
	$(BIN)/python bench/demo.py

test: .venv/fastnlcg
	$(BIN)/python -m pytest

# Leaks are not looked for: Python itself leaves memory to the end of the process. A GPU's memory is not the sanitizers'.
sanitize: .venv/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	  $(BIN)/python -m pytest -q tests/test_step.py tests/test_ops.py tests/test_properties.py \
	  -k "not billion and not ranks"

hard: .venv/sanitized
	$(BIN)/python -m pip install -q -c constraints.txt atheris
	$(BIN)/python tests/hard.py

bench: .venv/fastnlcg
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-json=build/step_cpu.json
	$(BIN)/python bench/step_table.py build/step_cpu.json

docs: .venv/fastnlcg
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

format: .venv/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# What every kernel needs on every architecture goes to build/cuda/resources.txt; spills are said.
cuda: .venv/tools
	mkdir -p build/cuda
	$(BIN)/python -m pip wheel -v --no-deps --no-build-isolation -w build/cuda . -C build.verbose=true \
	  -C cmake.define.FASTNLCG_CUDA=ON -C cmake.define.FASTNLCG_WERROR=ON \
	  -C cmake.define.CMAKE_CUDA_FLAGS=--resource-usage > build/cuda/log.txt 2>&1 || (cat build/cuda/log.txt; exit 1)
	grep -E "entry function|bytes spill|registers" build/cuda/log.txt | c++filt > build/cuda/resources.txt
	@echo "$$(grep -c 'entry function' build/cuda/resources.txt) kernels compiled;" \
	  "with spills: $$(grep -cE '[1-9][0-9]* bytes spill' build/cuda/resources.txt), see build/cuda/resources.txt"

# With the python of that machine, not .venv's
gpu:
	$(PYTHON) bench/gpu.py

study: .venv/fastnlcg
	$(BIN)/python bench/convergence/study.py --data $(DATA) --out build/study --jobs $$(nproc)
	OMP_NUM_THREADS=1 $(BIN)/python bench/convergence/cost.py build/study/cost.jsonl
	$(BIN)/python bench/convergence/plots.py build/study

gpu-study:
	$(PYTHON) bench/gpu.py --only build --out build/gpu-build.json
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/study.py --data $(DATA) --out build/gpu-study \
	  --device cuda --studies gpu
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/cost.py build/gpu-study/cost.jsonl --device cuda --models resnet32
	PYTHONPATH=build/gpu $(PYTHON) bench/convergence/plots.py build/gpu-study

# the same with sanitizers, beside it
.venv/sanitized: .venv/fastnlcg
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -C build-dir=build/sanitized-cmake \
	  -C cmake.define.FASTNLCG_SANITIZE=ON -C cmake.define.FASTNLCG_EMULATION=ON -C cmake.define.FASTNLCG_CUDA=OFF \
	  --target build/sanitized --upgrade .
	touch $@

clean:
	rm -rf .venv build demo

# numpy, torch and the tools, at the versions of constraints.txt
.venv/tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt $(TOOLS)
	touch $@

# the project itself, with warnings as errors
.venv/fastnlcg: .venv/tools $(SOURCES)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -C cmake.define.FASTNLCG_WERROR=ON \
	  -C cmake.define.FASTNLCG_EMULATION=ON .
	$(BIN)/python -m fastnlcg
	touch $@
