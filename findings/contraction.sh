#!/usr/bin/env bash
# Who fuses a * b + c when the processor can: gcc decides by the language, not by how strict the dialect is. -std=c11
# turns contraction off, -std=c++20 leaves it on and across statements (gcc/c-family/c-opts.cc, c_common_post_options).
# clang fuses within an expression, at -O0 too, because its front end already emits llvm.fmuladd; never across statements.
# It hurts bits that are to agree between C and C++, debug and release, x86-64 and aarch64 (whose baseline has FMA).
set -euo pipefail
for tool in gcc g++ clang clang++ aarch64-linux-gnu-g++; do
  command -v "$tool" > /dev/null || { echo "needs $tool (Debian: gcc g++ clang g++-aarch64-linux-gnu)" >&2; exit 2; }
done
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/source.c" <<'C'
#ifdef __cplusplus
extern "C"
#endif
float result(float a, float b, float c) {
#ifdef STATEMENTS
  float product = a * b;
  return product + c;
#else
  return a * b + c;
#endif
}
C
gcc --version | head -1
clang --version | head -1
fused() { if "$@" -S -o - "$tmp/source.c" | grep -qE '\bv?fn?madd'; then echo fused; else echo apart; fi; }
echo "expected: strict ISO dialects and -O0 fuse nothing; a statement is a border; aarch64 as x86-64 without options"
found=""
while read -r command; do
  # shellcheck disable=SC2086
  line="$command: one expression $(fused $command), two statements $(fused $command -DSTATEMENTS)"
  echo "found: $line"
  found+="$line"$'\n'
done << 'COMMANDS'
gcc -O2 -mfma -std=c11
gcc -O2 -mfma -std=gnu11
g++ -O2 -mfma -std=c++20 -xc++
g++ -O0 -mfma -std=c++20 -xc++
clang -O2 -mfma -std=c11
clang++ -O0 -mfma -std=c++20 -xc++
g++ -O2 -std=c++20 -xc++
aarch64-linux-gnu-g++ -O2 -std=c++20 -xc++
COMMANDS
truth='gcc -O2 -mfma -std=c11: one expression apart, two statements apart
gcc -O2 -mfma -std=gnu11: one expression fused, two statements fused
g++ -O2 -mfma -std=c++20 -xc++: one expression fused, two statements fused
g++ -O0 -mfma -std=c++20 -xc++: one expression apart, two statements apart
clang -O2 -mfma -std=c11: one expression fused, two statements apart
clang++ -O0 -mfma -std=c++20 -xc++: one expression fused, two statements apart
g++ -O2 -std=c++20 -xc++: one expression apart, two statements apart
aarch64-linux-gnu-g++ -O2 -std=c++20 -xc++: one expression fused, two statements fused
'
[[ $found == "$truth" ]] || { echo "CHANGED" >&2; exit 1; }
echo "as recorded"
