"""A preconditioner is a list of passes: tests/toy_preconditioner.cpp makes one outside csrc/, and one file in csrc/ and
cuda/ knows which ones there are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", "-I", str(ROOT / "csrc")]


@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-14"])
def test_a_new_preconditioner_runs_on_the_same_machinery(compiler: str, tmp_path: Path) -> None:
    """Compared with a plain loop, in float64. 6 steps of a dozen roundings each, and sums of 35,019 elements in another
    order: the difference stays below 1e-13 of the largest element, which is 450 roundings."""
    path = shutil.which(compiler)
    if path is None:
        pytest.skip(f"needs {compiler}")
    if compiler == "clang++-14" and os.path.realpath(path) == os.path.realpath(str(shutil.which("clang++"))):
        pytest.skip(f"{compiler} is clang++")
    program = tmp_path / "toy"
    openmp = ["-fopenmp"] if compiler == "g++" else []  # clang's libomp is a package of its own
    command = [compiler, *FLAGS, *openmp, str(ROOT / "tests" / "toy_preconditioner.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:4000]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["adagrad", "clipped", "norm first"]
    for line in lines:
        assert "6 steps" in line
        differences = [float(x) for x in re.findall(r"\b[pdv] (\S+?)(?:,|$)", line)]
        assert len(differences) == 3, line
        assert max(differences) < 1e-13, line
        assert ("clipped 1" in line) == (not line.startswith("adagrad")), line
        beta = float(line.split("beta ")[1].partition(",")[0])
        assert beta > 0.0, line


def test_only_the_list_of_preconditioners_names_them() -> None:
    """One line there, and a header of passes: what adding one takes in C++ and CUDA."""
    for path in [*(ROOT / "csrc").iterdir(), *(ROOT / "cuda").iterdir()]:
        code = re.sub(r"//.*", "", path.read_text())
        assert path.name == "preconditioners.h" or not re.search(r"\bPreconditioner::[a-z]", code), path.name
