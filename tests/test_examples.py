"""Every example runs, and learns what it is to learn."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import backends
import pytest

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py
ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "examples" / "train.py")
SHORT = ("--epochs", "10", "--batch", "512")
WORLDS = {
    "alone": [sys.executable],
    "ddp": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"],
    "fsdp2": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"],
}
MATRICES = ("--model", "transformer", "--preconditioner", "muon", "--lr", "0.03", "--epochs", "5")


def start(world: str, out: Path, *options: str) -> subprocess.Popen[str]:
    parallel = [] if world == "alone" else ["--parallel", world]
    # a port of torchrun's own choosing; one thread a rank
    rendezvous = [] if world == "alone" else ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [*WORLDS[world], *rendezvous, TRAIN, *parallel, *SHORT, "--out", str(out), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(world: str, out: Path, *options: str) -> str:
    process = start(world, out, *options)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def family(pid: int) -> list[int]:
    """A process and its descendants: torchrun puts every rank in a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in family(int(child)))]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "losses.csv").open() as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs."""
    folder = tmp_path_factory.mktemp("whole")
    for world in WORLDS:
        printed = run(world, folder / world, "--line-search", "--logdir", str(folder / world / "events"))
        assert re.search(r"30 steps on [12] ranks: training accuracy 9\d", printed), printed
        assert "30/30" in printed  # the progress bar
        assert printed.count("30/30") <= 4  # of rank 0 alone
    return {world: folder / world for world in WORLDS}


@pytest.mark.thorough  # starts three runs; test_distributed.py compares ranks with one process
def test_ranks_follow_one_process(whole: dict[str, Path]) -> None:
    alone = losses(whole["alone"])
    assert len(alone) == 30
    assert alone[-1] < 0.3 * alone[0]
    for world in ("ddp", "fsdp2"):
        assert losses(whole[world]) == pytest.approx(alone, rel=2e-3)
        assert [row["step"] for row in rows(whole[world])] == [str(k) for k in range(30)]


@pytest.mark.thorough  # starts three runs; the optimizer itself is in test_nlcg.py
def test_tensorboard_has_the_losses(whole: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in whole.values():
        events = EventAccumulator(str(folder / "events"))
        events.Reload()
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(folder), rel=1e-6)


@pytest.mark.thorough  # kills and resumes runs; test_checkpoints.py and test_distributed_checkpoints.py resume
@pytest.mark.parametrize("world", WORLDS)
def test_a_killed_run_goes_on_to_the_same_losses(whole: dict[str, Path], tmp_path: Path, world: str) -> None:
    """SIGKILL to all ranks, at whatever step they are in; alone twice."""
    options = ("--line-search", "--save-every", "4")
    for beyond in (6, 17) if world == "alone" else (11,):
        kill_beyond(beyond, world, tmp_path, *options)
        assert len(losses(tmp_path)) < 30
    run(world, tmp_path, *options)
    assert losses(tmp_path) == losses(whole[world])
    if world == "alone":
        assert "nothing to train" in run(world, tmp_path, *options)
        assert losses(tmp_path) == losses(whole[world])


def kill_beyond(steps: int, world: str, out: Path, *options: str) -> None:
    """Starts a run, and kills it after so many steps."""
    process = start(world, out, *options)
    path = out / "losses.csv"
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_text().count("\n") > steps + 1):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.thorough  # three runs of two ranks; test_muon_ranks.py compares ranks and resumes
def test_a_killed_run_with_matrices_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    """FSDP2, and Muon's direction: a transformer."""
    options = (*MATRICES, "--save-every", "4")
    run("fsdp2", tmp_path / "whole", *options)
    expected = losses(tmp_path / "whole")
    assert len(expected) == 20
    assert expected[-1] < 0.7 * expected[0]
    kill_beyond(9, "fsdp2", tmp_path / "killed", *options)
    assert len(losses(tmp_path / "killed")) < 20
    run("fsdp2", tmp_path / "killed", *options)
    assert losses(tmp_path / "killed") == expected


PRINTS = {
    "minimal": r"training accuracy 9[5-9]",
    "large_batch": r"best: 0.0[13]\n",
    "own_optimizer": r"loss [\d.]+e-0\d, of 1.08e\+03",
    "reference": r"adam +loss +3515.78 -> +9\d\.",
    "inverse": r"restored: root mean square error 0\.03",
    "pinn": r"\n +60 +\d\d +\d\.\d+e[-+]0\d",
}


# Those that train for long are thorough: test_nlcg.py trains with the optimizer itself.
THOROUGH = ("minimal", "large_batch")


@pytest.mark.parametrize("name", [*backends.thorough(*THOROUGH), *(name for name in PRINTS if name not in THOROUGH)])
def test_short_ones(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / f"{name}.py")]
    command += {"pinn": ["--iterations", "60"]}.get(name, [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTS[name], done.stdout), done.stdout


@pytest.mark.thorough  # executes a kernel of jupyter; test_nlcg.py reads diagnostics
@pytest.mark.filterwarnings("ignore")  # of jupyter's packages
def test_the_notebook() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "diagnostics.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("120 steps, 0 skipped" in output.get("text", "") for output in outputs)


def test_every_example_is_tested() -> None:
    tested = {*PRINTS, "train", "diagnostics", "with_accelerate", "with_lightning", "with_transformers"}
    assert {path.stem for path in (ROOT / "examples").iterdir() if path.is_file()} == tested


@pytest.mark.thorough  # imports the trainers; what they call is in test_torch.py and test_nlcg.py
@pytest.mark.parametrize(("name", "most"), [("accelerate", 0.1), ("lightning", 0.15), ("transformers", 0.2)])
def test_trainers(name: str, most: float) -> None:
    """And the line search has seen the losses: without one, ten steps warn."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = str(ROOT / "examples" / f"with_{name}.py")
    command = [sys.executable, "-W", "error:line_search is on", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    loss, steps, scale = re.search(r"loss ([\d.]+) after (\d+) steps, line-search scale ([\d.]+)", done.stdout).groups()
    assert float(loss) < most
    assert int(steps) >= 40
    assert 0.0 < float(scale) <= 1.0
