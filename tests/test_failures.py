"""A closure, an allocation or a disk that fails: nothing has changed, and training continues."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
import torch
from fastnlcg import NLCG
from fastnlcg.tensors import table
from quadratic import everything, one_step, parameter, quadratic_gradients, stepped


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_closure_that_raises_changes_nothing(error: type[BaseException]) -> None:
    ps, optimizer = stepped()
    qs, expected = stepped()
    before = everything(ps, optimizer)

    def closure() -> float:
        quadratic_gradients(ps)
        raise error

    with pytest.raises(error):
        optimizer.step(closure)
    assert everything(ps, optimizer) == before
    one_step(ps, optimizer)
    one_step(qs, expected)
    assert everything(ps, optimizer) == everything(qs, expected)


@pytest.mark.parametrize("late", [False, True], ids=["first step", "a new group"])
def test_running_out_of_memory_for_the_state_changes_nothing(
    preconditioner: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever tensor memory runs out. The next step is the one of a run that did not run out."""
    for room in range(3):
        ps, qs = ([parameter(20, seed=1), parameter(3, 4, seed=2)] for _ in range(2))
        optimizer, expected = (
            NLCG(ps if not late else ps[:1], 0.1, preconditioner=preconditioner),
            NLCG(qs if not late else qs[:1], 0.1, preconditioner=preconditioner),
        )
        if late:
            for _ in range(2):
                one_step(ps[:1], optimizer)
                one_step(qs[:1], expected)
            optimizer.add_param_group({"params": ps[1:]})
            expected.add_param_group({"params": qs[1:]})
        real, made = torch.empty_strided, []

        def empty(
            *args: object, real: object = real, made: list[int] = made, room: int = room, **kwargs: object
        ) -> torch.Tensor:
            made.append(1)
            if len(made) > room:
                raise torch.OutOfMemoryError("no room")
            return real(*args, **kwargs)

        before = [p.detach().clone() for p in ps]
        quadratic_gradients(ps)
        with monkeypatch.context() as inside:
            inside.setattr(torch, "empty_strided", empty)
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
                inside.undo()
                one_step(ps, optimizer)
        one_step(qs, expected)
        assert everything(ps, optimizer) == everything(qs, expected)
        assert len(made) >= 1


@pytest.mark.parametrize("where", ["_workspace", "flat_offsets"])
def test_running_out_of_memory_for_a_table_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of another dtype, which a model gets from ``double()``."""
    (ps, optimizer), (qs, expected) = stepped(), stepped()
    for p in (*ps, *qs):
        p.grad, p.data = None, p.detach().double()
    before = [p.detach().clone() for p in ps]

    def no_room(*args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as inside:
        inside.setattr(table, where, no_room)
        for _ in range(2):
            quadratic_gradients(ps)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    for _ in range(2):
        one_step(ps, optimizer)
        one_step(qs, expected)
    assert everything(ps, optimizer) == everything(qs, expected)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """Training continues with the same bits."""
    ps, optimizer = stepped()
    qs, expected = stepped()
    file = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), file)
    saved = file.read_bytes()

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises((OSError, RuntimeError)):
        torch.save(optimizer.state_dict(), Full())
    assert file.read_bytes() == saved
    one_step(ps, optimizer)
    one_step(qs, expected)
    assert everything(ps, optimizer) == everything(qs, expected)
