#!/usr/bin/env bash
# gcc 12 widens a vector of eight floats by two halves and an insertion where AVX-512 has one instruction for it, and four
# floats under AVX2 likewise: __builtin_convertvector is lowered as an unpacking into two vectors
# (gcc/tree-vect-generic.cc, expand_vector_conversion). clang 14 emits the one instruction; narrowing is one for both.
# It hurts loops that keep sums of floats in double: shuffles compete with the arithmetic. Intrinsics do not split.
set -euo pipefail
for tool in gcc clang; do command -v "$tool" > /dev/null || { echo "needs $tool (Debian 12: gcc clang)" >&2; exit 2; }; done
[[ $(gcc -dumpversion) == 12* ]] || { echo "needs gcc 12; this is $(gcc -dumpversion)" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/source.c" <<'C'
typedef float Float __attribute__((vector_size(4 * LANES)));
typedef double Double __attribute__((vector_size(8 * LANES)));
#ifdef WIDEN
Double f(Float x) { return __builtin_convertvector(x, Double); }
#else
Float f(Double x) { return __builtin_convertvector(x, Float); }
#endif
C
instructions() { "$@" -O3 -S -o - "$tmp/source.c" | grep -oE '^\s+v(cvt|extract|insert|mov[hl]+ps|shuf|perm)\w*' | xargs; }
gcc --version | head -1
clang --version | head -1
echo "expected: vcvtps2pd, vcvtps2pd and vcvtpd2ps, from both"
for compiler in gcc clang; do
  echo "found: $compiler: 8 wider: $(instructions $compiler -mavx512f -DLANES=8 -DWIDEN);" \
    "4 wider: $(instructions $compiler -mavx2 -DLANES=4 -DWIDEN); 4 narrower: $(instructions $compiler -mavx2 -DLANES=4)"
done | tee "$tmp/found"
cat > "$tmp/truth" <<'TRUTH'
found: gcc: 8 wider: vcvtps2pd vextractf128 vcvtps2pd vinsertf64x4; 4 wider: vcvtps2pd vmovhlps vcvtps2pd vinsertf128; 4 narrower: vcvtpd2psy
found: clang: 8 wider: vcvtps2pd; 4 wider: vcvtps2pd; 4 narrower: vcvtpd2ps
TRUTH
diff "$tmp/truth" "$tmp/found" || { echo "CHANGED" >&2; exit 1; }
echo "as recorded"
