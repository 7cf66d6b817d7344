"""One step, the same bits from every compiler and processor: tests/bits.cpp, compiled here, prints digests, and
tests/fixtures/bits.txt has those that gcc made on x86-64. After a change of the mathematics:
``FASTNLCG_NEW_BITS=1 python -m pytest "tests/test_bits.py::test_bits[g++]"`` writes it again."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastnlcg import _native

# Compiles the kernels for itself; test_step.py compares the instruction sets of this processor.
pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parent.parent
EXPECTED = ROOT / "tests" / "fixtures" / "bits.txt"
# As CMakeLists.txt has them.
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-I", str(ROOT / "csrc")]
SETS = {
    "x86_64": {
        "baseline": ("kBaseline", "-march=x86-64"),
        "avx2": ("kAvx2", "-march=x86-64 -mavx2 -mfma"),
        "avx512": ("kAvx512", "-march=x86-64 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"),
    },
    "aarch64": {"neon": ("kNeon", "")},
}
# By name: processor, compiler, what is given to it and the linker, what runs the result.
BUILDS = {
    "g++": (platform.machine(), "g++", "-fopenmp", [""]),
    "clang++": (platform.machine(), "clang++", "", [""]),  # one thread: libomp is a package of its own
    "clang++-14": (platform.machine(), "clang++-14", "", [""]),
    "clang++-19": (platform.machine(), "clang++-19", "", [""]),
    # "-cpu max" has SVE.
    "aarch64": (
        "aarch64",
        "aarch64-linux-gnu-g++",
        "-fopenmp -static",
        ["qemu-aarch64-static", "qemu-aarch64-static -cpu max"],
    ),
}


def compile_program(
    folder: Path, compiler: str, flags: str, march_of: dict[str, tuple[str, str]], run_here: list[str]
) -> Path:
    """``run_here``: the instruction sets that will run; the others are only names for the linker."""

    def run(*arguments: str) -> None:
        done = subprocess.run([compiler, *FLAGS, *shlex.split(flags), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]

    def compile_set(isa: str) -> str:
        symbol, march = march_of[isa]
        named = [f'-DFASTNLCG_ISA_NAME="{isa}"', f"-DFASTNLCG_ISA_SYMBOL={symbol}", *shlex.split(march)]
        source, target = ROOT / "csrc" / "step_cpu.cpp", str(folder / f"{isa}.o")
        if isa not in run_here:
            source = folder / f"{isa}.cpp"
            source.write_text(f'#include "step_cpu.h"\nconst fastnlcg::CpuKernels fastnlcg::{symbol} = {{}};\n')
        run(*named, "-w", "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_set, march_of))
    sources = [str(ROOT / "tests" / "bits.cpp"), str(ROOT / "csrc" / "dispatch_cpu.cpp")]
    run(*sources, *objects, "-o", str(folder / "bits"))
    return folder / "bits"


@pytest.mark.parametrize("build", BUILDS)
def test_bits(build: str, tmp_path: Path) -> None:
    processor, compiler, flags, runners = BUILDS[build]
    for program in (compiler, *(shlex.split(runner)[0] for runner in runners if runner)):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    here = os.path.realpath(str(shutil.which(compiler)))
    for other in itertools.takewhile(lambda name: name != build, BUILDS):
        if os.path.realpath(str(shutil.which(BUILDS[other][1]))) == here:
            pytest.skip(f"{compiler} is {other}")
    isas = list(SETS[processor]) if runners[0] else _native.instruction_sets()
    program = compile_program(tmp_path, compiler, flags, SETS[processor], isas)
    for runner, isa in itertools.product(runners, isas):
        command = [*shlex.split(runner), str(program)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, "FASTNLCG_ISA": isa}
        )
        assert done.returncode == 0, done.stderr
        if os.environ.get("FASTNLCG_NEW_BITS"):
            EXPECTED.write_text(done.stdout)
        lines, expected = done.stdout.splitlines(), EXPECTED.read_text().splitlines()
        assert len(lines) > 150
        assert not [line for line in lines if line.startswith("00000000")]  # a lost mode, an unwanted skip
        other_bits = [f"{got} instead of {line}" for got, line in zip(lines, expected, strict=True) if got != line]
        assert not other_bits, f"{isa}: {len(other_bits)} of {len(lines)} cases differ:\n" + "\n".join(other_bits[:20])
