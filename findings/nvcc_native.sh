#!/usr/bin/env bash
# "native" where there is no GPU: nvcc 13.0 warns (-Werror=all-warnings does not stop its own warnings), compiles for the
# oldest GPU it knows, sm_75, and exits with 0. CMake 3.26 refuses to generate, CMake 4.4 passes -arch=native on, and takes
# nvcc's default where no architecture is named (Modules/CMakeDetermineCUDACompiler.cmake).
# It hurts images built without a GPU: code for Turing, and PTX that the driver compiles again at the first start.
set -euo pipefail
if nvidia-smi -L > /dev/null 2>&1; then echo "needs a machine without an NVIDIA GPU" >&2; exit 2; fi
command -v g++ > /dev/null || { echo "needs g++" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
pip() { python3 -m pip install -qq --disable-pip-version-check --no-deps --target "$@"; }
pip "$tmp/cuda" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.51
pip "$tmp/cmake326" cmake==3.26.4
pip "$tmp/cmake44" cmake==4.4.4
pip "$tmp/ninja" ninja==1.13.2
toolkit="$tmp/cuda/nvidia/cu13"
export PATH="$toolkit/bin:$tmp/ninja/bin:$PATH" LIBRARY_PATH="$toolkit/lib" CUDACXX="$toolkit/bin/nvcc"
unset CUDAARCHS
mkdir "$tmp/project"
echo '__global__ void kernel(float* p) { *p = 1; }' > "$tmp/project/kernel.cu"
cat > "$tmp/project/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.26)
project(native LANGUAGES CXX CUDA)
add_library(kernel OBJECT kernel.cu)
CMAKE

inside() { cuobjdump -lelf -lptx "$1" | grep -oE 'sm_[0-9]+\.(cubin|ptx)' | sort | xargs; }
by_cmake() {
  local folder="$tmp/build" version=$1
  shift
  rm -rf "$folder"
  if PYTHONPATH="$tmp/$version" "$tmp/$version/bin/cmake" -G Ninja -S "$tmp/project" -B "$folder" "$@" > "$tmp/log" 2>&1 &&
    PYTHONPATH="$tmp/$version" "$tmp/$version/bin/cmake" --build "$folder" > "$tmp/log" 2>&1; then
    inside "$(find "$folder" -name kernel.cu.o)"
  elif grep -q '"native", but no .*GPU was detected' "$tmp/log"; then
    echo refused
  else
    cat "$tmp/log" >&2
    return 1
  fi
}
nvcc --version | grep release
nvcc -Werror=all-warnings -arch=native -c "$tmp/project/kernel.cu" -o "$tmp/native.o" 2> "$tmp/said"
echo "expected: an error from each, for there is nothing to detect; and all architectures, or the newest, where none is named"
echo "found: nvcc said: $(cat "$tmp/said")"
found="nvcc -arch=native: $(inside "$tmp/native.o")
CMake 3.26.4, native: $(by_cmake cmake326 -DCMAKE_CUDA_ARCHITECTURES=native)
CMake 4.4.4, native: $(by_cmake cmake44 -DCMAKE_CUDA_ARCHITECTURES=native)
CMake 4.4.4, none: $(by_cmake cmake44)"
echo "found: ${found//$'\n'/$'\n'found: }"
truth='nvcc -arch=native: sm_75.cubin sm_75.ptx
CMake 3.26.4, native: refused
CMake 4.4.4, native: sm_75.cubin sm_75.ptx
CMake 4.4.4, none: sm_75.cubin sm_75.ptx'
[[ $found == "$truth" ]] || { echo "CHANGED" >&2; exit 1; }
echo "as recorded"
