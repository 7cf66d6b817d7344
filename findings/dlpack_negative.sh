#!/usr/bin/env bash
# A tensor with the lazy negative bit, as x.conj().imag has, leaves through DLPack with its sign lost: __dlpack__
# (torch/_tensor.py) refuses the conjugate bit and does not look at the negative one; .numpy() refuses both.
# It hurts imaginary parts handed to NumPy, JAX or a kernel, and one-element gradients of torch.complex(a, b).conj(),
# which autograd leaves in .grad with that bit.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" torch==2.13.0 numpy==2.4.6 jax==0.10.2
cat > "$tmp/run.py" <<'PY'
import sys

import jax
import numpy as np
import torch


def attempt(convert, tensor):
    try:
        return np.asarray(convert(tensor)).tolist()
    except (RuntimeError, BufferError) as error:
        return type(error).__name__


z = torch.tensor([1 + 2j])
imaginary = z.conj().imag
b = torch.tensor([4.0], requires_grad=True)
(torch.complex(torch.tensor([3.0]), b).conj() * (1 + 1j)).real.sum().backward()
found = {
    "imaginary part": (imaginary.tolist(), imaginary.is_neg()),
    "by numpy()": attempt(lambda t: t.numpy(), imaginary),
    "by numpy.from_dlpack": attempt(np.from_dlpack, imaginary),
    "by jax.dlpack.from_dlpack": attempt(jax.dlpack.from_dlpack, imaginary),
    "by torch.from_dlpack": attempt(torch.from_dlpack, imaginary),
    "conj() by numpy.from_dlpack": attempt(np.from_dlpack, z.conj()),
    "b.grad": (b.grad.tolist(), b.grad.is_neg()),
    "b.grad by numpy.from_dlpack": attempt(np.from_dlpack, b.grad),
}
print("torch", torch.__version__, "numpy", np.__version__, "jax", jax.__version__)
print("expected: [-2.0] or an error, from every way out; and a gradient without lazy bits")
for key, value in found.items():
    print(f"found: {key}: {value}")
truth = [([-2.0], True), "RuntimeError", [2.0], [2.0], [2.0], "BufferError", ([1.0], True), [-1.0]]
if list(found.values()) != truth:
    sys.exit("CHANGED")
print("as recorded: the opposite sign, in silence")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py"
