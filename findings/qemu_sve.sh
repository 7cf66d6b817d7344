#!/usr/bin/env bash
# `qemu-aarch64 -cpu max` has SVE up to 2048 bits, and runs programs with vectors of 512: user-mode QEMU starts as Linux
# does, with /proc/sys/abi/sve_default_vector_length, 64 bytes (sve-default-vector-length in target/arm/cpu64.c). A run
# there has tried one length of sixteen, and neither the 256 of a Graviton 3 nor the 128 of a Grace.
# It hurts code with SVE that was "tested under -cpu max": other lengths have to be asked for one by one.
set -euo pipefail
for tool in aarch64-linux-gnu-gcc qemu-aarch64-static; do
  command -v "$tool" > /dev/null || { echo "needs $tool (Debian: gcc-aarch64-linux-gnu qemu-user-static)" >&2; exit 2; }
done
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/length.c" <<'C'
#include <arm_sve.h>
#include <stdio.h>
int main(void) { printf("%d", 8 * (int)svcntb()); }
C
aarch64-linux-gnu-gcc -O1 -march=armv8-a+sve -static "$tmp/length.c" -o "$tmp/length"
qemu-aarch64-static --version | head -1
echo "expected: -cpu max: 2048"
found="-cpu max: $(qemu-aarch64-static -cpu max "$tmp/length"), -cpu max,sve-default-vector-length=-1: \
$(qemu-aarch64-static -cpu max,sve-default-vector-length=-1 "$tmp/length")"
echo "found: bits of a vector: $found"
[[ $found == "-cpu max: 512, -cpu max,sve-default-vector-length=-1: 2048" ]] || { echo "CHANGED" >&2; exit 1; }
echo "as recorded"
