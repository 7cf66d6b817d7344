"""The machine code of the compiled kernels, for every architecture in the module: which loads are in flight together,
registers, spills, and which instructions are allowed. bench/sass.py reads it; no GPU is needed."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastnlcg.__main__ import report

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import sass
from sass import Instruction, Kernel

ARCHITECTURES = [name.removesuffix("-real") for name in report()["cuda"]["architectures"].split()]
pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="the module was built without CUDA"),
    pytest.mark.skipif(
        sass.tool("cuobjdump") is None or sass.tool("nvdisasm") is None, reason="needs cuobjdump and nvdisasm"
    ),
]

WITHOUT_P = ("AdamDots", "MuonDots")  # its weight decay is not part of the gradient
PASSES = {
    "Plain": ["PlainDots", "PlainMove"],
    "Bfgs": ["CurvatureDot", "CurvatureAndDots", "CurvatureAndMove"],
    "Adam": ["AdamDots", "AdamMove"],
    "Muon": ["MuonDots", "MuonMove"],
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kernels(architecture: str) -> dict[str, Kernel]:
    return sass.kernels_of(sass.module(), architecture)


def quads(name: str, state: str, resident: bool) -> Iterator[tuple[int, ...]]:
    """The loads of one quad of a pass, as widths in bytes: p and g of every type, wide and narrow. `resident`: what the
    first pass has left in shared memory is not loaded."""
    in_model = 1 if name in WITHOUT_P else 2  # g and p; the other streams are the state's
    scattered = in_model - (1 if resident else 0)
    of_state = sass.LOADS[name] - in_model - (1 if resident else 0)
    wide_state = (8,) * of_state if state == "bfloat16" else (16,) * (of_state * (2 if state == "double" else 1))
    for size in (8,) if state == "double" else (4, 2):
        whole = (16, 16) if size == 8 else (16,) if size == 4 else (8,)
        yield tuple(sorted(whole * scattered + wide_state))
        yield tuple(sorted((size,) * 4 * scattered + wide_state))


def pass_of(kernel: Kernel) -> tuple[str, str]:
    """The type of the state, and the pass, or the preconditioner where all passes are in one launch; clipping loads
    nothing else."""
    _, state, first, *_ = re.findall(r"\w+", re.sub(r"(WithNorm|Repeated|Clipped)<", "", kernel.name))
    return "bfloat16" if kernel.name.endswith("BFloat16>") else state, first


def expected(kernel: Kernel) -> set[tuple[int, ...]]:
    """What the groups of a kernel may be: whole quads, one or two together."""
    state, first = pass_of(kernel)
    one_launch = kernel.name.startswith("step_in_one")
    names = PASSES[first] if one_launch else [first]
    resident = [False, True] if one_launch and first not in ("Plain", "Muon") else [False]
    allowed = set()
    for name in names:
        for kept in resident:
            for quad in quads(name, state, kept):
                allowed |= {quad, tuple(sorted(quad * 2))}
    return allowed


def steps(kernels: dict[str, Kernel]) -> list[Kernel]:
    found = [k for name, k in kernels.items() if name.startswith(("step_pass", "step_in_one"))]
    # Passes, with the norm, repeated; those of "adam" and "muon" over state in bfloat16; in one launch, with clipping.
    assert len(found) == 2 * (9 + 4 + 4) + (4 + 2 + 2) + (4 + 4)
    return found


def test_all_loads_of_a_quad_are_in_flight_together(kernels: dict[str, Kernel]) -> None:
    """In every pass, for every type, wide and narrow: nothing waits between the first and the last. Not asked of
    float64 that does not lie on 16 bytes: sm_75 and sm_80 part its loads in one pass."""
    for kernel in steps(kernels):
        groups = kernel.groups()
        allowed = expected(kernel)
        for group in groups:
            if "<double" in kernel.name and 8 in group.widths:
                continue
            assert group.widths in allowed, f"{kernel.name}: {group.widths}, then {group.until}"
        assert len(groups) >= 2 * (1 if "<double" in kernel.name else 3), kernel.name


def test_the_widest_way_loads_what_is_claimed(kernels: dict[str, Kernel]) -> None:
    for kernel in steps(kernels):
        if "<float" in kernel.name and kernel.name.startswith("step_pass"):
            state, name = pass_of(kernel)
            in_flight = max(sum(group.widths) for group in kernel.groups())
            in_model = 1 if name in WITHOUT_P else 2
            of_state = (8 if state == "bfloat16" else 16) * (sass.LOADS[name] - in_model)
            twice = 2 if name in ("PlainDots", "CurvatureDot") or state == "bfloat16" else 1
            assert in_flight == twice * (16 * in_model + of_state), kernel.name


def test_registers_and_spills(kernels: dict[str, Kernel]) -> None:
    """Two blocks of 512 threads a multiprocessor for a pass of float32, one for all passes in one launch and over state
    in bfloat16."""
    for name, kernel in kernels.items():
        two = name.startswith(("step_pass<float", "part<float")) and not name.endswith("BFloat16>")
        assert kernel.registers <= (64 if two else 128), name
        assert not {"LDL", "STL"} & kernel.counts.keys(), name


def test_square_roots_of_the_decision_are_one_threads(kernels: dict[str, Kernel]) -> None:
    """1/sqrt(ys) and 1/sqrt(shs) are formed where the step is decided, not by every thread of the next pass."""
    for kernel in steps(kernels):
        roots = [i.address for i in kernel.code if i.name == "MUFU.RSQ64H"]
        if kernel.name.startswith("step_pass<float, Curvature"):
            assert bool(roots) == ("CurvatureAndMove<float>, NoPass" not in kernel.name), kernel.name
            assert min(roots, default=1 << 30) > max(g.loads[-1].address for g in kernel.groups()), kernel.name


def test_atomics_are_ordered_at_the_devices_scope(kernels: dict[str, Kernel]) -> None:
    """A barrier of memory before every atomic of the grid-wide barrier, and L1 dropped behind it."""
    for kernel in steps(kernels):
        code = kernel.code
        atomics = [k for k, i in enumerate(code) if i.opcode in ("ATOM", "ATOMG")]
        assert len(atomics) >= 1, kernel.name
        for k in atomics:
            assert ".STRONG.GPU" in code[k].name, code[k].text
            assert any(i.opcode == "MEMBAR" and ".GPU" in i.name for i in code[max(0, k - 24) : k]), kernel.name
            assert any(i.name == "CCTL.IVALL" for i in code[k : k + 24]), kernel.name


def test_no_load_bypasses_coherence(kernels: dict[str, Kernel]) -> None:
    for kernel in kernels.values():
        assert not [i.text for i in kernel.code if i.opcode == "LDG" and ".CONSTANT" in i.name], kernel.name


def test_the_portable_code_rounds_to_nearest_and_contracts_nothing() -> None:
    """What the driver of a GPU newer than the module compiles: it may not fuse a multiplication and an addition either,
    and the only fused ones are those of the sums, whose products are exact."""
    ptx = sass.ptx_of(sass.module())
    assert ".entry" in ptx
    arithmetic = Counter(re.findall(r"\b(?:add|sub|mul|div|sqrt|rcp|fma|mad)\.(?:[a-z0-9]+\.)*f(?:32|64)\b", ptx))
    assert arithmetic
    assert all(".rn." in name for name in arithmetic), arithmetic
    assert not [name for name in arithmetic if name.startswith(("fma", "mad")) and name.endswith("f32")], arithmetic
    assert "ld.global.nc" not in ptx
    assert not re.search(r"\.ftz\b", ptx)
    assert set(re.findall(r"\batom\.\S+|\bred\.\S+", ptx)) == {"atom.add.acq_rel.gpu.u32"}


def test_a_load_behind_a_wait_is_found() -> None:
    """The lint itself: what it said of the kernels before their loads were put together."""

    def kernel(waits: int) -> Kernel:
        def load(address: int, mask: int = 0) -> Instruction:
            return Instruction(address, "LDG.E.NA.128 R4, [R2.64]", "", 5, mask)

        middle = Instruction(0x20, "FMUL R8, R4, R9", "", 7, waits)
        return Kernel("k", 64, [load(0), load(0x10), middle, load(0x30), Instruction(0x40, "EXIT", "", 7, 0)])

    assert [g.widths for g in kernel(0).groups()] == [(16, 16, 16)]
    (first, second) = kernel(1 << 5).groups()
    assert (first.widths, second.widths) == ((16, 16), (16,))
    assert first.until == "20: FMUL R8, R4, R9"
