"""The CUDA kernels under ThreadSanitizer, on the emulation: every CUDA thread is a fiber that the detector knows, and
the only order between them is what the kernels' own barriers, shuffles and atomics make. Two mutants show that it would
report a race if that order were missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

# Builds with ThreadSanitizer, once in one worker; test_cuda.py compares the bits of the same forms of launch.
pytestmark = [pytest.mark.thorough, pytest.mark.xdist_group("race")]
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


# ---- the grid-wide barrier, every interleaving -----------------------------------------------------------------------
#
# A model of cuda/reduce.cuh: each atomic operation of a block's thread 0 is one step, and any block may take the next.
# Sequentially consistent, so it says nothing of memory orders (ThreadSanitizer does), but covers every schedule.


@dataclass(frozen=True)
class Barrier:
    """All that a launch's blocks share and where each of them is."""

    arrived: int
    generation: int
    at: tuple[str, ...]  # of every block: what it does next
    passes: tuple[int, ...]  # of every block: in which pass it is
    read: tuple[int, ...]  # of every block: the generation it saw first
    decided: int  # passes


def successors(s: Barrier, passes: int, skips: bool, mutant: str) -> Iterator[Barrier]:
    wrap = 4  # of the generation: wrapping round is harmless
    blocks = len(s.at)

    def move(b: int, to: str, **changes: Any) -> Barrier:
        return replace(s, at=(*s.at[:b], to, *s.at[b + 1 :]), **changes)

    def put(values: tuple[int, ...], b: int, value: int) -> tuple[int, ...]:
        return (*values[:b], value, *values[b + 1 :])

    for b in range(blocks):
        number = s.passes[b]
        final = number == passes - 1
        after = "end" if final else "wait"
        match s.at[b]:
            case "begin":  # barrier_generation()
                yield move(b, "sum", read=put(s.read, b, s.generation))
            case "sum":  # a pass begins only when the one before is decided
                assert s.decided == number
                yield move(b, "arrive")
            case "arrive":  # is_last_block(): fetch_add
                last = s.arrived == blocks - 1
                assert s.arrived < blocks
                late = mutant == "generation read late" and number == 0
                yield move(b, "reset" if last else "read late" if late else after, arrived=s.arrived + 1)
            case "read late":
                yield move(b, after, read=put(s.read, b, s.generation))
            case "reset":
                first = mutant != "reset after the release" or final
                yield move(b, "decide" if first else "decide, reset", arrived=0 if first else s.arrived)
            case "decide" | "decide, reset" as what:
                assert all(other in ("wait", "end") for i, other in enumerate(s.at) if i != b)
                if final or what == "decide, reset":
                    yield move(b, "end" if final else "release, reset", decided=s.decided + 1)
                else:
                    yield move(b, "release", decided=s.decided + 1)
            case "release":
                to = "end" if skips else "sum"
                yield move(b, to, generation=(s.generation + 1) % wrap, passes=put(s.passes, b, number + 1))
            case "release, reset":
                yield move(b, "late reset", generation=(s.generation + 1) % wrap)
            case "late reset":
                yield move(b, "end" if skips else "sum", arrived=0, passes=put(s.passes, b, number + 1))
            case "wait":
                if s.generation != (s.read[b] + number) % wrap:
                    yield move(b, "end" if skips else "sum", passes=put(s.passes, b, number + 1))


def explore(blocks: int, generation: int, passes: int, skips: bool, mutant: str = "") -> set[Barrier]:
    """Every state a launch can come to. Where no block can go on, all have ended, and the barrier is as it was."""
    start = Barrier(0, generation, ("begin",) * blocks, (0,) * blocks, (0,) * blocks, 0)
    seen, ahead = {start}, [start]
    while ahead:
        state = ahead.pop()
        following = list(successors(state, passes, skips, mutant))
        if not following:
            assert all(at == "end" for at in state.at), "a deadlock"
            assert state.arrived == 0
            assert state.generation == (generation + (1 if skips else passes - 1)) % 4
        new = [s for s in following if s not in seen]
        seen.update(new)
        ahead += new
    return seen


@pytest.mark.parametrize("passes", [2, 3])
def test_the_barrier_in_every_interleaving(passes: int) -> None:
    """Launch after launch on one barrier, of other grids, one of which skips: from any generation the first left."""
    for generation in range(4):
        for blocks in (1, 2, 3):
            for skips in (False, True):
                assert len(explore(blocks, generation, passes, skips)) > 2 * blocks * passes


@pytest.mark.parametrize("mutant", ["generation read late", "reset after the release"])
def test_the_model_finds_a_broken_barrier(mutant: str) -> None:
    with pytest.raises(AssertionError):
        explore(3, 0, 3, False, mutant)
