"""``python -m fastnlcg``, and the README's lines of use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fastnlcg import __main__ as main
from fastnlcg import _native, reference


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastnlcg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_text_and_json(isa: str) -> None:
    done = run()
    assert done.returncode == 0
    assert isa in done.stdout
    assert "self-check   passed" in done.stdout
    facts = json.loads(run("--json").stdout)
    assert facts["cpu"]["instruction_set"] == isa
    assert facts["self_check"]["passed"]
    assert facts["version"] == _native.version
    cuda = facts["cuda"]
    assert cuda["unavailable_reason"]  # the CUDA step does not exist yet


def test_a_wrong_instruction_set_is_reported_and_fails() -> None:
    done = run(FASTNLCG_ISA="mmx")
    assert done.returncode == 1
    assert "FASTNLCG_ISA is 'mmx'" in done.stdout


def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "conjugate_direction", lambda z, beta, d: z + 1.01 * beta * d)
    assert main.main([]) == 1
    assert "FAILED" in capsys.readouterr().out
