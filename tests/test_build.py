"""What CMake decides about CUDA, by configuring with compilers that pretend."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fastnlcg import _native

ROOT = Path(__file__).parent.parent
CMAKE = Path(sys.executable).parent / "cmake"
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(not CMAKE.exists(), reason="needs cmake beside this python")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def configure(tmp_path: Path, nvcc: str, *, mode: str = "AUTO") -> tuple[int, str]:
    """The exit status, and what CMake says; ``nvcc`` is the script of the only one there is."""
    import pybind11

    fake = tmp_path / "nvcc"
    fake.write_text(f"#!/bin/sh\n{nvcc}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    done = subprocess.run(
        [
            *(str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DFASTNLCG_CUDA={mode}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *("-DSKBUILD_PROJECT_VERSION=0", "-DSKBUILD_PROJECT_VERSION_FULL=0"),
        ],
        env={**os.environ, "CUDACXX": str(fake)},
        capture_output=True,
        text=True,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def pretends(release: str, *refused: str) -> str:
    """The real one under another version, which does not know some architectures."""
    refuse = "".join(f"*{name}*) echo unsupported {name} >&2; exit 1;;" for name in refused)
    return (
        f'case "$*" in --version) echo "Cuda compilation tools, release {release}, V"; exit 0;; {refuse} esac\n'
        f'exec {NVCC} "$@"'
    )


@needs_nvcc
@pytest.mark.thorough  # configures CMake; make cuda compiles
def test_an_older_nvcc_is_asked_for_the_architectures_it_knows(tmp_path: Path) -> None:
    """CUDA 12.4 knows neither 100 nor 120: once, they were asked for, and the build failed."""
    status, said = configure(tmp_path, pretends("12.4", "_100", "_120"))
    assert status == 0, said
    assert "fastnlcg: built with CUDA 12.4 for 75-real 80-real 86-real 89-real 90 " in said


@needs_nvcc
@pytest.mark.thorough  # configures CMake; make cuda compiles
def test_a_newer_nvcc_is_asked_for_all(tmp_path: Path) -> None:
    status, said = configure(tmp_path, pretends("12.8"))
    assert status == 0, said
    assert "fastnlcg: built with CUDA 12.8 for 75-real 80-real 86-real 89-real 90-real 100-real 120 " in said


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("echo release 11.8, V11.8.89", "is of CUDA 11.8; the kernels need 12.1 or newer"),
        ("exit 1", "does not say its version"),
        ('case "$*" in --version) echo release 12.9, V12.9;; *) exit 1;; esac', "(CUDA 12.9) does not compile for"),
    ],
)
def test_where_cuda_cannot_be_compiled_auto_says_why_and_builds_without(tmp_path: Path, nvcc: str, reason: str) -> None:
    status, said = configure(tmp_path, nvcc)
    assert status == 0, said
    assert "fastnlcg: built without CUDA, because" in said
    assert reason in said
    shutil.rmtree(tmp_path / "build")
    status, said = configure(tmp_path, nvcc, mode="ON")
    assert status != 0
    assert reason in said


# ---- what was built --------------------------------------------------------------------------------------------------


def readelf(*options: str) -> str:
    from fastnlcg import _core

    return subprocess.run(
        ["readelf", "-W", *options, _core.__file__], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_the_module_is_hardened_and_links_no_more_than_it_needs() -> None:
    dynamic = readelf("-d")
    assert re.search(r"\(FLAGS(_1)?\).*\b(BIND_NOW|NOW)\b", dynamic)
    assert "GNU_RELRO" in readelf("-l")
    assert re.search(r"GNU_STACK.* RW +0x", readelf("-l"))  # no executable stack
    assert "__stack_chk_fail" in readelf("--dyn-syms")
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    names = {re.split(r"[.-]", name)[0] for name in needed}
    assert names <= {"libgomp", "libomp", "libstdc++", "libm", "libgcc_s", "libc", "libpthread", "librt", "libdl", "ld"}


@pytest.mark.thorough  # starts processes that import torch
@pytest.mark.parametrize("first", ["torch", "fastnlcg"])
def test_one_openmp_runtime_in_the_process(first: str) -> None:
    """torch's, where torch is imported first; a wheel must not bring one of its own (pyproject.toml, cibuildwheel)."""
    if "clang" in _native.compiler.lower():
        pytest.skip("clang brings libomp, beside torch's libgomp: docs/limits.md")
    second = {"torch": "fastnlcg", "fastnlcg": "torch"}[first]
    code = f"""
import {first}, {second}, re
import torch
from fastnlcg import NLCG
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones_like(p)
torch.set_num_threads(2); NLCG([p]).step(); p.sum()
print(*sorted(set(re.findall(r"/\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read()))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert len(found) == 1, found
