#!/usr/bin/env bash
# jax.dlpack.from_dlpack() shares a CPU tensor's memory when its address is a multiple of 64 and copies it otherwise, by
# default without a word (jaxlib's dlpack_managed_tensor_to_buffer; only copy=False raises, jax/_src/dlpack.py). So a later
# in-place change shows in the "immutable" array or does not, by where the tensor happens to begin.
# It hurts whoever passes slices or parameters to JAX and continues to train them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6 jax==0.10.2
cat > "$tmp/run.py" <<'PY'
import sys

import jax
import numpy as np
import torch

memory = torch.zeros(64)
first = -memory.data_ptr() // 4 % 16  # of the elements, the first on a multiple of 64 bytes


def shared(offset):
    tensor = memory[first + offset : first + offset + 8]
    array = jax.dlpack.from_dlpack(tensor)
    tensor.fill_(1.0)
    seen = bool((np.asarray(array) == 1).all())
    tensor.zero_()
    return seen


found = {f"{4 * k} bytes behind": shared(k) for k in (0, 1, 4, 8, 16)}
print("torch", torch.__version__, "jax", jax.__version__)
print("expected: DLPack shares memory: always, or never")
print(f"found: shared at a multiple of 64 and {found}")
if list(found.values()) != [True, False, False, False, True]:
    sys.exit("CHANGED")
print("as recorded: a view or a copy, by the address")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
