#!/usr/bin/env bash
# nvcc compiles one source with the same options to other bytes every time: it leaves the name of an intermediate file,
# tmpxft_<process id>..., in the object's symbol table (the host compiler's STT_FILE symbol of .cudafe1.cpp). Machine code,
# PTX and fatbin are the same, and so are the objects once stripped, or compiled with -keep.
# It hurts reproducible builds and caches keyed by the object; a wheel that is stripped does not show it.
set -euo pipefail
for tool in g++ strip; do command -v "$tool" > /dev/null || { echo "needs $tool (Debian: g++ binutils)" >&2; exit 2; }; done
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$tmp/cuda" nvidia-cuda-nvcc==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88 nvidia-cuda-cccl==13.0.85
export PATH="$tmp/cuda/nvidia/cu13/bin:$PATH"
cd "$tmp"
echo '__global__ void kernel(float* p) { *p = 1; }' > kernel.cu
digest() { sha256sum < "$1" | cut -c1-12; }
names() { strings "$1" | grep -oE 'tmpxft_[0-9a-f]+' | sort -u | xargs; }
for run in 1 2; do
  mkdir "kept$run"
  nvcc -O2 -arch=sm_90 -c kernel.cu -o plain.o
  (cd "kept$run" && nvcc -O2 -arch=sm_90 -keep -c ../kernel.cu -o ../kept.o)
  nvcc -O2 -arch=sm_90 -fatbin kernel.cu -o kernel.fatbin
  strip -s plain.o -o stripped.o
  echo "$(digest plain.o) $(digest stripped.o) $(digest kernel.fatbin) $(digest kept.o) $(names plain.o)" > "run$run"
done
nvcc --version | grep release
echo "expected: the same object twice"
for run in 1 2; do
  read -r plain stripped fatbin kept name < "run$run"
  echo "found: run $run: object $plain (with $name), stripped $stripped, fatbin $fatbin, object with -keep $kept"
done
same() { [[ $(cut -d' ' -f"$1" run1) == $(cut -d' ' -f"$1" run2) ]]; }
if same 1 || ! same 2 || ! same 3 || ! same 4; then echo "CHANGED" >&2; exit 1; fi
echo "as recorded: only the name differs"
