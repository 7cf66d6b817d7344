"""Fuzz target: one byte string encodes one call into the argument checks, or one ``load_state_dict``.

``one_input`` is the target of a coverage-guided fuzzer, and of random bytes in the tests::

    python tests/fuzz.py --seconds 600          # atheris (pip install atheris), coverage of the Python side

A refused call raises one of REFUSALS and has written nothing; an accepted call writes only into its arrays. Anything
else is a finding: the bytes are printed, and belong into CORPUS below once it is fixed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fastnlcg import NLCG, OnlineLineSearch, _native, ops
from fastnlcg.options import Options
from fastnlcg.tensors.table import DLPACK_API
from torch import nn

REFUSALS = (TypeError, ValueError, RuntimeError)
CORPUS = [
    bytes.fromhex(text)
    for text in (
        "0039ad26fffffffe000000000000000000040004",
        "d9920d99ae997fc38c8f8a78fd7b942a1a79bf2e",
        "a0de84a67b680137812967e52142c88885ab5fa3",
        "1ce093ddfd6911a93bcce1a9c9a0dd2050cc1ee6",
        "a519cb86ea0a6aa7cc8380a7d30a78a0f0167a74",
        "3e8865fe7057af65a65d6a643c57e749abe389b346bc07490eec26586874e47231b528925c85f9ad24d3f60192119c975262ddd2baa7b880a2e0509c",
        "4811e702ca10799b3f4a06403df8508b01663ca20a88741e6bc0db986dc180e4f97d5f171f07a7da769f49a07393b488882d198f638f73eb5d87d5d4",
        "1c103b39b826b5d4807a3b8621088403f21ca0bb",
    )
]


class Choices:
    """Decisions read from bytes; when they are used up, always the first choice."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def below(self, n: int) -> int:
        if self.at >= len(self.data):
            return 0
        self.at += 1
        return self.data[self.at - 1] % n

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]


GUARD = 32
LENGTHS = [5, 5, 5, 5, 17, 0, 1, 100]
DTYPES = ["f4", "f4", "f4", "f4", "f8", "f2", "i4", "c8", "?", ">f4"]
NUMBERS: list[Any] = [
    *(0.5, 0.5, 0.0, 1.0, -1.0, 1e-8, 3, float("nan"), float("inf"), 1e-320, 1e308, 10**400, "x", None, True),
    *(np.float32(0.25), np.int64(2), 2**31, 2**63, -(2**63), 1j, [1.0], np.ones(2), torch.tensor(0.5)),
]
WORDS: list[Any] = [
    "adam",
    "bfgs",
    None,
    "fletcher_reeves",
    "polak_ribiere",
    "x",
    "",
    3,
    b"adam",
    float("nan"),
]


class Room:
    """Arrays between guard words, and a copy of all of it."""

    def __init__(self, choose: Choices) -> None:
        self.choose = choose
        self.bases: list[np.ndarray] = []
        self.given: list[Any] = []
        self.dtype = choose.of(["f4", "f4", "f8"])

    def array(self) -> Any:
        choose = self.choose
        kind = choose.below(24)
        n = choose.of(LENGTHS)
        dtype = np.dtype(self.dtype if kind < 18 else choose.of(DTYPES))
        base = np.full(n * 2 + 2 * GUARD, 7, dtype)
        base[GUARD : GUARD + n] = (np.arange(n) % 5 + 1) / 4
        self.bases.append(base)
        inside: Any = base[GUARD : GUARD + n]
        if kind == 1:
            inside = base[GUARD : GUARD + 2 * n : 2]
        elif kind == 2:
            inside = inside.copy()
            inside.flags.writeable = False
        elif kind == 3 and len(self.bases) > 1:  # the memory of another array
            inside = self.bases[-2][GUARD - 1 : GUARD - 1 + n]
        elif kind == 4:
            inside = choose.of([None, "array", 5, [1.0] * n, object(), inside.tolist(), memoryview(inside)])
        elif kind == 5 and dtype.kind == "f":
            inside = torch.from_numpy(base)[GUARD : GUARD + n]
        elif kind == 6:
            inside = torch.ones(n, dtype=choose.of([torch.bfloat16, torch.float16, torch.int64, torch.complex64]))
        elif kind == 7:
            inside = (ctypes.c_float * n)(*[1.0] * n)
        elif kind == 8:
            inside = inside.reshape(choose.of([(n, 1), (1, n), (1, n, 1), (n,)]))
        elif kind == 9:
            inside = choose.of([torch.ones(n, device="meta"), torch.ones(n).to_sparse(), nn.Parameter(torch.ones(n))])
        elif kind == 10:
            inside = inside[::-1]
        self.given.append(inside)
        return inside

    def number(self) -> Any:
        return self.choose.of(NUMBERS)

    def bytes(self) -> list[bytes]:
        return [base.tobytes() for base in self.bases]

    def guards(self) -> list[bytes]:
        return [base[:GUARD].tobytes() + base[-GUARD:].tobytes() for base in self.bases]


def call(room: Room, function: Callable[..., Any], *arrays: Any, **numbers: Any) -> None:
    before, guards = room.bytes(), room.guards()
    try:
        function(*arrays, **numbers)
    except REFUSALS:
        assert room.bytes() == before, "a refusal has written"
    else:
        assert room.guards() == guards, "written outside the arrays"


def some(room: Room, **numbers: Callable[[], Any]) -> dict[str, Any]:
    """The keywords of a function that this input gives."""
    return {name: make() for name, make in numbers.items() if room.choose.below(4)}


def call_ops(choose: Choices) -> None:
    room = Room(choose)
    a, n, word = room.array, room.number, lambda: choose.of(WORDS)
    which = choose.below(6)
    common = {"threads": n, "stream": lambda: choose.of([None, 0, 0, -1, "s", 2**70])}
    if which == 0:
        call(room, ops.bfgs_diag_update, a(), a(), a(), a(), alpha_prev=n(), **some(room, curvature_eps=n, **common))
    elif which == 1:
        call(room, ops.preconditioned_dots, a(), choose.of([None, a()]), a(), **some(room, eps=n, **common))
    elif which == 2:
        more = some(room, eps=n, p=a, alpha=n, g_prev=a, **common)
        call(room, ops.direction_update, a(), a(), choose.of([None, a()]), beta=n(), **more)
    elif which == 3:
        call(
            room, ops.adam_preconditioned_dots, a(), a(), updates=n(), **some(room, beta2=n, eps=n, g_prev=a, **common)
        )
    elif which == 4:
        more = some(room, beta2=n, eps=n, p=a, alpha=n, weight_decay=n, g_prev=a, **common)
        call(room, ops.adam_direction_update, a(), a(), a(), beta=n(), updates=n(), **more)
    else:
        fields = {f: n() for f in ("step", "rz", "loss_prev", "ls_scale", "updates") if not choose.below(6)}
        scalars = choose.of([ops.Scalars(), ops.Scalars(), None, {}])
        if isinstance(scalars, ops.Scalars):
            for name, value in fields.items():
                with contextlib.suppress(*REFUSALS):
                    setattr(scalars, name, value)
        more = some(room, loss=n, weight_decay=n, update=word, eps=n, beta2=n, beta_max=n, **common)
        more |= some(room, line_search=lambda: choose.of([None, OnlineLineSearch(), (1, 2)]))
        call(room, ops.nlcg_step, a(), a(), a(), a(), a(), scalars, lr=n(), preconditioner=word(), **more)


JUNK: list[Any] = [
    *(None, 0, 1, -1, 0.5, float("nan"), float("inf"), 2**63, 10**400, "x", b"x", [], {}, (), True, 1j),
    *(torch.zeros(3), torch.zeros(()), torch.full((4,), float("nan")), torch.zeros(4, dtype=torch.int64)),
    *(torch.tensor(1e308, dtype=torch.float64), np.zeros(4), object(), {"step": 1}, [0, 0], torch.zeros(4).to_sparse()),
]


def optimizer_of(choose: Choices) -> tuple[list[nn.Parameter], NLCG]:
    ps = [nn.Parameter(torch.linspace(-1, 1, 4)), nn.Parameter(torch.ones(2, 3, dtype=torch.float32))]
    optimizer = NLCG([{"params": ps[:1]}, {"params": ps[1:]}], 0.1, preconditioner=choose.of(["adam", "bfgs", None]))
    for t in range(choose.below(3)):
        for p in ps:
            p.grad = (t + 1.0) * p.detach()
        optimizer.step()
    return ps, optimizer


def load_state(choose: Choices) -> None:
    """A state dict with a few things changed: it loads and can be stepped, or is refused, and nothing has changed."""
    ps, optimizer = optimizer_of(choose)
    saved = copy.deepcopy(optimizer_of(choose)[1].state_dict())
    for _ in range(choose.below(3) + 1):
        place: Any = saved
        for _ in range(choose.below(4)):
            inside = place[choose.of(list(place))] if isinstance(place, dict) and place else None
            inside = choose.of(place) if isinstance(place, list) and place else inside
            if not isinstance(inside, dict | list):
                break
            place = inside
        if isinstance(place, dict):
            key = choose.of([*list(place), "new", 7, None])
            if choose.below(3):
                place[key] = choose.of(JUNK)
            else:
                place.pop(key, None)
        elif isinstance(place, list):
            place.insert(choose.below(len(place) + 1), choose.of(JUNK))
    before = repr((optimizer.state_dict(), ps))
    try:
        optimizer.load_state_dict(saved)
    except REFUSALS:
        assert repr((optimizer.state_dict(), ps)) == before, "a refusal has changed the optimizer"
    for p in ps:
        p.grad = p.detach().clone()
    try:
        optimizer.step()
        optimizer.diagnostics()
    except REFUSALS:  # for example, an lr that is not a number
        pass
    with contextlib.suppress(REFUSALS):
        optimizer.state_dict()


ROWS = 4
PASSES = ["trial", "slope", "curvature", "direction", "pair", "gradient_dots", "direction_dots", "residual"]
PASSES += ["pair_direction", "mark", "x"]


def call_core(choose: Choices) -> None:
    """Calls of the native step in orders, and with tensors, that the Python side never makes."""
    n = choose.of([8, 40, 32, 0])
    keep = {name: np.ones(max(n, 1) + 8, np.float32) for name in ("g_prev", "d", "diagonal", "origin", "p", "g")}
    views = {name: x[:n] for name, x in keep.items()}
    rows = np.ones(ROWS * n + 8, np.float32)
    whole = {name: torch.from_numpy(x) for name, x in views.items()}
    dtype = choose.of(["float32", "float32", "float64"])
    table, flat = _native.TensorTable(dtype), _native.FlatStep(dtype)
    in_entry = {"direction": "direction", "grad_prev": "grad_prev", "diagonal": "hessian_diag", "origin": "origin"}
    keys = _native.StateKeys(**{slot: key for slot, key in (in_entry | {"steps": "step"}).items() if choose.below(4)})
    wrong = [None, 3, torch.zeros(5), torch.ones(n, dtype=torch.float64), torch.zeros(4).to_sparse(), "x"]

    def tensor(name: str) -> Any:
        return choose.of([whole[name], whole[name], whole[name], *wrong])

    def tensors() -> Any:
        many = choose.of([1, 1, 0, 2])
        entry = {"direction": tensor("d"), "grad_prev": tensor("g_prev"), "hessian_diag": tensor("diagonal")}
        entry["origin"] = tensor("origin")
        entry["step"] = choose.of([torch.zeros((), dtype=torch.float64), torch.zeros(()), None])
        p = [choose.of([whole["p"], whole["p"], torch.zeros(3), None])] * many
        held = choose.of([None, {whole["p"]: entry}, {}])
        scalars = choose.of([torch.zeros(len(_native.SCALARS), dtype=torch.float64), torch.zeros(3), torch.ones(())])
        alpha = [choose.of([torch.zeros((), dtype=torch.float64), torch.zeros(2)])] * choose.of([1, 1, 2, 0])
        gradients = choose.of([[tensor("g")] * many, None, [None], 7])
        return _native.Tensors(
            params=p,
            gradients=gradients,
            entries=choose.of([[entry] * many, [None] * many]),
            state=held,
            scalars=scalars,
            alpha_prev=alpha,
        )

    right = {"offset": 0, "group": 0, "index": 0, "dtype": "float32", "shape": (n,), "strides": (1,)}
    for _ in range(12):
        what = choose.below(9)
        try:
            if what == 0:
                kind = choose.of(["adam", "bfgs", None])
                options = choose.of([Options(preconditioner=kind).native(), {}, {"eps": "x"}])
                choose.of([table, flat]).set_options(options)
            elif what == 1:
                segment = _native.SegmentSpec(**right)
                odd = {"offset": choose.of([0, 4, -1, 2**62]), "group": choose.of([0, 5, -1]), "shape": (4,), "run": -1}
                segments = choose.of([[segment], [segment], [], [odd], [segment, segment], [{"dtype": "f9"}]])
                segments = [_native.SegmentSpec(**(right | s)) if isinstance(s, dict) else s for s in segments]
                groups = choose.of([1, 1, 2, -1])
                table.lay_out(choose.of([n, 0, -1, 2**62]), segments, groups, keys, DLPACK_API, torch.Tensor)
            elif what in (2, 3):
                groups = choose.of([1, 1, 2, 0])
                table.step(
                    tensors(), [0.1] * groups, [0.0] * groups, [False] * groups, 0.0, 0.5, choose.of([1, 2, 0, -5])
                )
            elif what == 4:
                choose.of([table.state_norms, table.last_move])(tensors(), 1)
            elif what == 5:
                names = {"p": "p", "g": "g", "grad_prev": "g_prev", "direction": "d", "diagonal": "diagonal"}
                names["origin"] = "origin"
                some_of = {slot: _native.Buffer(views[name]) for slot, name in names.items() if choose.below(3)}
                if choose.of([True, False]):
                    some_of["rows"] = _native.Buffer(rows[: choose.of([ROWS, ROWS, 1]) * n])
                flat.bind(**some_of, steps=choose.of([0.0, 3.0, -1.0, float("nan")]))
            elif what == 6:
                choose.of([table, flat]).set_launch(choose.of(["one", "automatic", "x"]), choose.below(3), -1)
            elif what == 7:
                kind = choose.of(PASSES)
                flags = {name: choose.of([True, False]) for name in ("first", "preconditioned", "update")}
                numbers = {name: choose.of([0.5, 0.0, -1.0, float("nan")]) for name in ("alpha", "ys", "shs", "beta")}
                numbers |= {name: choose.of([0, 1, 2, 5, -1, 2**31 - 1]) for name in ("row", "y_row", "count")}
                pass_, threads = _native.DescentPass(kind, **flags, **numbers), choose.of([1, 2, -5])
                if choose.of([True, False]):
                    flat.descend(pass_, threads)
                else:
                    table.descend(tensors(), pass_, threads)
            else:
                scalars = _native.Buffer(np.zeros(choose.of([len(_native.SCALARS) + 2, 3])))
                choose.of(
                    [
                        lambda: flat.update_curvature(0.1, 1),
                        lambda: flat.preconditioned_dots(1),
                        lambda: flat.update_direction(0.1, 0.0, 0.5, 1),
                        lambda s=scalars: flat.step(s, 0.1, 0.0, False, 0.5, 1),
                    ]
                )()
        except REFUSALS:
            pass
    for name, x in keep.items():
        assert np.all(x[n:] == 1.0), f"written behind {name}"
    assert np.all(rows[ROWS * n :] == 1.0), "written behind rows"


def one_input(data: bytes) -> None:
    choose = Choices(data)
    (call_ops, call_ops, load_state, call_core)[choose.below(4)](choose)


def main() -> None:
    import atheris

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    arguments, _ = parser.parse_known_args()
    warnings.simplefilter("ignore")
    for module in (ops, _native, *(m for name, m in sys.modules.items() if name.startswith("fastnlcg."))):
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, atheris.instrument_func(value))
    limits = [f"-max_total_time={arguments.seconds}", "-max_len=200", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
