"""One step, the same bits from every compiler and processor: tests/bits.cpp, compiled here, prints digests, and
tests/fixtures/bits.txt has those that gcc made on x86-64. After a change of the mathematics:
``FASTNLCG_NEW_BITS=1 python -m pytest tests/test_bits.py -k "g++ and x86_64"`` writes it anew."""

from __future__ import annotations

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
    "g++": (platform.machine(), "g++", "-fopenmp", ""),
    "clang++": (platform.machine(), "clang++", "", ""),  # one thread: libomp is a package of its own
    "clang++-14": (platform.machine(), "clang++-14", "", ""),
    "clang++-19": (platform.machine(), "clang++-19", "", ""),
    "aarch64": ("aarch64", "aarch64-linux-gnu-g++", "-fopenmp -static", "qemu-aarch64-static"),
    "aarch64 with SVE": ("aarch64", "aarch64-linux-gnu-g++", "-fopenmp -static", "qemu-aarch64-static -cpu max"),
}


def compile_program(folder: Path, processor: str, compiler: str, flags: str) -> Path:
    def run(*arguments: str) -> None:
        done = subprocess.run([compiler, *FLAGS, *shlex.split(flags), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]

    def compile_set(isa: str) -> str:
        symbol, march = SETS[processor][isa]
        named = [f'-DFASTNLCG_ISA_NAME="{isa}"', f"-DFASTNLCG_ISA_SYMBOL={symbol}"]
        run(
            *named, *shlex.split(march), "-w", "-c", str(ROOT / "csrc" / "step_cpu.cpp"), "-o", str(folder / f"{isa}.o")
        )
        return str(folder / f"{isa}.o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_set, SETS[processor]))
    sources = [str(ROOT / "tests" / "bits.cpp"), str(ROOT / "csrc" / "dispatch_cpu.cpp")]
    run(*sources, *objects, "-o", str(folder / "bits"))
    return folder / "bits"


@pytest.mark.parametrize("build", BUILDS)
def test_bits(build: str, tmp_path: Path) -> None:
    processor, compiler, flags, runner = BUILDS[build]
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    if runner and shutil.which(shlex.split(runner)[0]) is None:
        pytest.skip(f"needs {shlex.split(runner)[0]}, of qemu-user-static")
    program = compile_program(tmp_path, processor, compiler, flags)
    here = not runner
    for isa in _native.instruction_sets() if here else SETS[processor]:
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
        other = [f"{got} instead of {line}" for got, line in zip(lines, expected, strict=True) if got != line]
        assert not other, f"{isa}: {len(other)} of {len(lines)} cases differ:\n" + "\n".join(other[:20])
