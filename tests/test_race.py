"""The CUDA kernels under ThreadSanitizer, on the emulation: every CUDA thread is a fiber that the detector knows, and
the only order between them is what the kernels' own barriers, shuffles and atomics make. Two mutants show that it would
report a race if that order were missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-ffp-contract=off", "-fno-tree-slp-vectorize", "-pthread"]
QUIET = ["-Wno-unknown-pragmas", "-Wno-tsan"]


def build(folder: Path, root: Path = ROOT, *definitions: str) -> Path:
    emulation = root / "tests" / "emulation"
    command = ["g++", *FLAGS, *QUIET, *definitions, "-I", str(emulation), str(emulation / "race.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "race")], capture_output=True, text=True)
    if "cannot find -ltsan" in done.stderr:
        pytest.skip("needs libtsan, which comes with gcc")
    assert done.returncode == 0, done.stderr
    return folder / "race"


def run(binary: Path, kind: str, options: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(binary), kind], capture_output=True, text=True, timeout=300, env={"TSAN_OPTIONS": f"exitcode=66 {options}"}
    )
    if "FATAL: ThreadSanitizer" in done.stderr and "memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run with this kernel's address randomization")
    return done


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("race"))


@pytest.mark.parametrize("kind", ["adam", "bfgs", "none"])
def test_no_race_in_any_form_of_launch(detector: Path, kind: str) -> None:
    done = run(detector, kind)
    assert done.returncode == 0, done.stderr[:4000]
    assert "the same bits" in done.stdout
    assert "WARNING: ThreadSanitizer" not in done.stderr


def test_a_barrier_of_relaxed_atomics_is_reported(tmp_path: Path) -> None:
    done = run(build(tmp_path, ROOT, "-DMUTANT_RELAXED"), "bfgs", "halt_on_error=1")
    assert done.returncode == 66
    assert "data race" in done.stderr


def test_one_set_of_totals_instead_of_two_is_reported(tmp_path: Path) -> None:
    """Shared memory that a block may begin to write while its first warp still reads it."""
    for folder in ("csrc", "cuda", "tests/emulation"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "cuda" / "reduce.cuh"
    text, count = re.subn(r"of_warp\[parity & 1\]", "of_warp[0]", source.read_text())
    assert count == 1
    source.write_text(text)
    done = run(build(tmp_path, tmp_path), "bfgs", "halt_on_error=1")
    assert done.returncode == 66
    assert "block_totals" in done.stderr
