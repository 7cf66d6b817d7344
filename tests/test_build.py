"""What CMake decides about CUDA, by configuring with compilers that pretend."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_an_older_nvcc_is_asked_for_the_architectures_it_knows(tmp_path: Path) -> None:
    """CUDA 12.4 knows neither 100 nor 120: once, they were asked for, and the build failed."""
    status, said = configure(tmp_path, pretends("12.4", "_100", "_120"))
    assert status == 0, said
    assert "fastnlcg: built with CUDA 12.4 for 75-real 80-real 86-real 89-real 90 " in said


@needs_nvcc
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
