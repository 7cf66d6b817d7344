"""From torch.optim.Muon, with AdamW for the rest, to NLCG and back; and the state's files."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import NLCG, muon_groups
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(30, 24), nn.LSTM(24, 20, batch_first=True), First(), nn.Linear(20, 24), nn.Linear(24, 30)
    )


class First(nn.Module):
    def forward(self, both: Any) -> Any:
        return both[0]


def split(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    groups = muon_groups(net, lr=0.02)
    inside = [p for group in groups if group["preconditioner"] == "muon" for p in group["params"]]
    return inside, [p for group in groups if group["preconditioner"] != "muon" for p in group["params"]]


def torchs(net: nn.Module, momentum: float = 0.9, **of_adamw: Any) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    inside, rest = split(net)
    muon = torch.optim.Muon(inside, lr=0.02, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, **of_adamw)


def ours(net: nn.Module, **options: Any) -> NLCG:
    inside, rest = split(net)
    groups = [{"params": rest}, {"params": inside, "preconditioner": "muon", "beta_max": 0.9}]
    return NLCG(groups, lr=0.002, **options)


def train(net: nn.Module, optimizers: Any, begin: int, end: int, scale: float = 1.0) -> None:
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        x, y = (torch.randint(0, 30, (8, 9), generator=generator) for _ in range(2))
        net.zero_grad()
        (scale * nn.functional.cross_entropy(net(x).flatten(0, 1), y.flatten())).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_run_of_muon_is_continued() -> None:
    """With a constant beta the next steps are Muon's and AdamW's, up to torch's bfloat16 products."""
    net = network()
    muon, adamw = torchs(net)
    train(net, (muon, adamw), 0, 6)
    other = network()
    other.load_state_dict(net.state_dict())
    nlcg = ours(other, update="heavy_ball")
    nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())
    before = [p.detach().clone() for p in net.parameters()]
    train(net, (muon, adamw), 6, 9)
    train(other, (nlcg,), 6, 9)
    matrices = {id(p) for model in (net, other) for p in split(model)[0]}
    for (name, a), b, p in zip(net.named_parameters(), other.parameters(), before, strict=True):
        theirs, found = a.detach() - p, b.detach() - p
        # The direction of the rest is AdamW's up to changes of h, which are large in the first steps.
        tolerance = 0.06 if id(a) in matrices else 0.6
        assert torch.linalg.vector_norm(found - theirs) < tolerance * torch.linalg.vector_norm(theirs), name


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_first_beta_after_it_is_the_cap(scale: float) -> None:
    net = network()
    muon, adamw = torchs(net)
    train(net, (muon, adamw), 0, 6)
    nlcg = ours(net)
    nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())
    train(net, (nlcg,), 6, 7, scale)
    assert nlcg.diagnostics().beta_matrices == 0.9
    assert nlcg.diagnostics().step == 7


@pytest.mark.parametrize("of_adamw", [{}, {"betas": (0.9, 0.95), "eps": 1e-10}])
def test_there_and_back(of_adamw: dict[str, Any]) -> None:
    net = network()
    muon, adamw = torchs(net, **of_adamw)
    train(net, (muon, adamw), 0, 6)
    nlcg = ours(net)
    nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())
    states = nlcg.muon_state_dict(momentum=0.9)
    for theirs, found in zip((muon.state_dict(), adamw.state_dict()), states, strict=True):
        assert found["state"].keys() == theirs["state"].keys()
        for i, entry in theirs["state"].items():
            for key, value in entry.items():
                torch.testing.assert_close(found["state"][i][key], value, rtol=1e-5, atol=1e-9)
        for group, expected in zip(found["param_groups"], theirs["param_groups"], strict=True):
            for key, value in expected.items():
                assert group[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    muon.load_state_dict(states[0])
    adamw.load_state_dict(states[1])
    train(net, (muon, adamw), 6, 7)


def test_a_convolution_there_and_back() -> None:
    """torch's Muon takes it as (out, the rest)."""
    stem = nn.Parameter(torch.randn(6, 4, 3, 3))
    nlcg = NLCG([stem], preconditioner="muon", update="heavy_ball", lr=0.02)
    flat = nn.Parameter(stem.detach().flatten(1))
    muon = torch.optim.Muon([flat], adjust_lr_fn="match_rms_adamw")
    for t in range(4):
        stem.grad = torch.randn(stem.shape)
        flat.grad = stem.grad.flatten(1)
        nlcg.step()
        if t == 1:
            muon.load_state_dict(nlcg.muon_state_dict()[0])
            flat.data.copy_(stem.detach().flatten(1))
        elif t > 1:
            muon.step()
    torch.testing.assert_close(flat.detach(), stem.detach().flatten(1), rtol=0.02, atol=0.002)
    direction = nlcg.state[stem]["direction"].clone()
    nlcg.load_muon_state_dict(nlcg.muon_state_dict()[0])
    torch.testing.assert_close(nlcg.state[stem]["direction"], direction)


def test_groups_of_muon_groups_take_one_group_of_muon() -> None:
    """The gates of an LSTM are apart in a group of their own."""
    net = network()
    muon, _ = torchs(net)
    train(net, (muon,), 0, 2)
    nlcg = NLCG(muon_groups(net, lr=0.01))
    sizes = [len(group["params"]) for group in nlcg.param_groups]
    assert len(sizes) > 3
    params = [p for group in nlcg.param_groups if group["preconditioner"] == "adam" for p in group["params"]]
    adamw = torch.optim.AdamW(
        [{"params": g["params"]} for g in nlcg.param_groups if g["preconditioner"] == "adam"], lr=0.02
    )
    assert params
    nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())
    inside = [group for group in nlcg.param_groups if group["preconditioner"] == "muon"]
    assert [group["split"] for group in inside] == [4, None]
    assert all(group["lr"] == 0.02 for group in inside)


def alike() -> tuple[nn.ModuleDict, torch.optim.AdamW]:
    net = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abc"} | {"head": nn.Linear(8, 2, bias=False)})
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return net, torch.optim.AdamW(net["head"].parameters())


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_one_group_of_muon_is_divided_by_names(order: str) -> None:
    """``split`` puts b into a group of its own, before or after the others."""
    net, adamw = alike()
    muon = torch.optim.Muon([(f"module.{name}.weight", net[name].weight) for name in order])
    muon.step()
    nlcg = NLCG(muon_groups(net, lr=0.02, split={"b.weight": 2}))
    nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())
    for name in order:
        torch.testing.assert_close(nlcg.state[net[name].weight]["direction"], -net[name].weight.grad)
    another = torch.optim.Muon([(name, net[name].weight) for name in order]).state_dict()
    with pytest.raises(ValueError, match=r"'param_names'\]\[0\] is 'a|c', expected 'a.weight'"):
        nlcg.load_muon_state_dict(another, adamw.state_dict())


def test_parameters_that_may_be_mistaken_for_each_other_are_refused() -> None:
    net, adamw = alike()
    muon = torch.optim.Muon([net[name].weight for name in "abc"])
    nlcg = NLCG(muon_groups(net, lr=0.02, split={"b.weight": 2}))
    with pytest.raises(ValueError, match=r"muon has one group, .* 8 x 8 in several groups"):
        nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())


@pytest.mark.parametrize(("option", "value"), [("maximize", True), ("stacked", True), ("split", 2)])
def test_what_muon_lacks_is_refused(option: str, value: Any) -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))]}]
    groups += [{"params": [nn.Parameter(torch.ones(4, 4))], "preconditioner": "muon", option: value}]
    nlcg = NLCG(groups)
    message = f"parameter group 1 has {option}={value}, which has no counterpart; expected"
    with pytest.raises(ValueError, match=message):
        nlcg.muon_state_dict()
    if option == "maximize":
        muon, adamw = torch.optim.Muon(groups[1]["params"]), torch.optim.AdamW(groups[0]["params"])
        with pytest.raises(ValueError, match=message):
            nlcg.load_muon_state_dict(muon.state_dict(), adamw.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nesterov": False}, r"param_groups\[0\] has nesterov=False, which has no counterpart; expected True"),
        ({"ns_steps": 7}, "ns_steps=7, which has no counterpart"),
        ({"eps": 10.0}, "eps=10.0, which has no counterpart; expected 1e-07"),
        ({"momentum": 1.0}, "Invalid momentum: 1.0"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: dict[str, Any], message: str) -> None:
    net = network()
    muon, adamw = torchs(net)
    train(net, (muon, adamw), 0, 1)
    saved = muon.state_dict()
    saved["param_groups"][0].update(change)
    with pytest.raises(ValueError, match=message):
        ours(net).load_muon_state_dict(saved, adamw.state_dict())


def test_other_optimizers_files_are_refused() -> None:
    net = network()
    muon, adamw = torchs(net)
    train(net, (muon, adamw), 0, 1)
    nlcg = ours(net)
    with pytest.raises(ValueError, match="not the state dict of torch.optim.Muon"):
        nlcg.load_muon_state_dict(torch.optim.SGD(split(net)[0], lr=0.1).state_dict(), adamw.state_dict())
    with pytest.raises(ValueError, match="adamw is needed for groups with another preconditioner"):
        nlcg.load_muon_state_dict(muon.state_dict())
    other = torch.optim.AdamW([p for part in split(net) for p in part])
    with pytest.raises(ValueError, match=r"^adamw: param_groups have \[\d+\] parameters, expected \[\d"):
        nlcg.load_muon_state_dict(muon.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="expected 'adam'"):
        nlcg.load_adamw_state_dict(adamw.state_dict() | {"param_groups": nlcg.state_dict()["param_groups"]})
    with pytest.raises(ValueError, match="no parameter group has preconditioner='muon'"):
        NLCG(net.parameters()).load_muon_state_dict(muon.state_dict(), adamw.state_dict())


def test_a_file_is_loaded_or_refused_as_a_whole() -> None:
    net = network()
    nlcg = ours(net)
    train(net, (nlcg,), 0, 2)
    file = io.BytesIO()
    torch.save(nlcg.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = ours(net)
    again.load_state_dict(saved)
    for p in net.parameters():
        assert all(torch.equal(again.state[p][key], value) for key, value in nlcg.state[p].items())
    lacking = {**saved, "state": {k: dict(v) for k, v in saved["state"].items()}}
    del lacking["state"][0]["exp_avg_sq"]  # a parameter of the rest, which comes first
    with pytest.raises(ValueError, match="state of parameter 0 has"):
        again.load_state_dict(lacking)


# ---- muon_groups -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.position = nn.Parameter(torch.zeros(9, 16))
        self.attention = nn.MultiheadAttention(16, 2)
        self.qkv = nn.Linear(16, 48)
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.experts = nn.Parameter(torch.zeros(4, 16, 24))
        self.norm = nn.LayerNorm(16)
        self.gate = nn.Linear(16, 1)
        self.token_mixer = nn.Linear(9, 9)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(16, 30)


def names(groups: list[dict[str, Any]], **wanted: Any) -> set[str]:
    return {
        name for g in groups if all(g.get(key) == value for key, value in wanted.items()) for name in g["param_names"]
    }


def test_muon_groups_split_a_module() -> None:
    groups = muon_groups(Model(), lr=0.02, weight_decay=0.1, split={"qkv.weight": 3})
    assert names(groups, preconditioner="muon", stacked=False, split=None) == {
        "attention.out_proj.weight",
        "stem.weight",
        "token_mixer.weight",
    }
    assert names(groups, split=3) == {"qkv.weight", "attention.in_proj_weight"}
    assert names(groups, stacked=True) == {"experts"}
    assert names(groups, preconditioner="adam", weight_decay=pytest.approx(1.0)) == {
        "embed.weight",
        "position",
        "depthwise.weight",
        "gate.weight",
        "head.weight",
    }
    assert all(p.dim() == 1 for g in groups if g["weight_decay"] == 0.0 for p in g["params"])
    every = {name for name, p in Model().named_parameters() if p.requires_grad}
    assert set().union(*(g["param_names"] for g in groups)) == every
    assert all(g["lr"] == pytest.approx(0.02 if g["preconditioner"] == "muon" else 0.002) for g in groups)
    NLCG(groups)


def kinds(module: nn.Module, **arguments: Any) -> dict[str, str]:
    """What the parameters of two or more dimensions are, by name: so many matrices, a stack, or a vector that decays or
    not."""
    found = {}
    for group in muon_groups(module, lr=0.02, weight_decay=0.1, **arguments):
        kind = "decays" if group["weight_decay"] else "vector"
        if group["preconditioner"] == "muon":
            kind = "stack" if group["stacked"] else f"{group['split'] or 1}"
        found |= {name: kind for name, p in zip(group["param_names"], group["params"], strict=True) if p.dim() >= 2}
    return found


class Holder(nn.Module):
    """Holds parameters of zeros under these names."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class HeadNorm(Holder):
    pass


# What torch.nn makes, other modules, and parametrizations of them.
OF_MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "LayerNorm": (lambda: nn.LayerNorm([8, 6, 6]), {"weight": "vector", "bias": "vector"}),
    "RMSNorm": (lambda: nn.RMSNorm([6, 6]), {"weight": "vector"}),
    "another norm": (lambda: HeadNorm(gain=(4, 8)), {"gain": "vector"}),
    "LSTM": (
        lambda: nn.LSTM(6, 8, proj_size=3),
        {"weight_ih_l0": "4", "weight_hh_l0": "4", "weight_hr_l0": "1"},
    ),
    "LSTM of numbers": (lambda: nn.LSTM(1, 8), {"weight_ih_l0": "decays", "weight_hh_l0": "4"}),
    "GRU of one state": (lambda: nn.GRU(6, 1), {"weight_ih_l0": "decays", "weight_hh_l0": "decays"}),
    "LSTMCell": (lambda: nn.LSTMCell(5, 8), {"weight_ih": "4", "weight_hh": "4"}),
    "GRUCell": (lambda: nn.GRUCell(5, 8), {"weight_ih": "3", "weight_hh": "3"}),
    "RNNCell": (lambda: nn.RNNCell(5, 8), {"weight_ih": "1", "weight_hh": "1"}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        {"in_proj_weight": "3", "bias_k": "vector", "bias_v": "vector", "out_proj.weight": "1"},
    ),
    "Conv2d, normed": (
        lambda: weight_norm(nn.Conv2d(3, 8, 3)),
        {"parametrizations.weight.original0": "decays", "parametrizations.weight.original1": "1"},
    ),
    "Conv2d, spectral": (lambda: spectral_norm(nn.Conv2d(3, 8, 3)), {"parametrizations.weight.original": "1"}),
    "Embedding, normed": (
        lambda: weight_norm(nn.Embedding(10, 8)),
        {"parametrizations.weight.original0": "decays", "parametrizations.weight.original1": "decays"},
    ),
    "LSTM, normed": (
        lambda: weight_norm(nn.LSTM(4, 8), "weight_hh_l0"),
        {
            "weight_ih_l0": "4",
            "parametrizations.weight_hh_l0.original0": "decays",
            "parametrizations.weight_hh_l0.original1": "4",
        },
    ),
    "attention, spectral": (
        lambda: spectral_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        {"parametrizations.in_proj_weight.original": "3", "out_proj.weight": "1"},
    ),
    "experts": (
        lambda: Holder(gate_up_proj=(4, 8, 16), gate_up_proj_bias=(4, 16), attention_biases=(4, 9)),
        {"gate_up_proj": "stack", "gate_up_proj_bias": "vector", "attention_biases": "vector"},
    ),
    "tables": (
        lambda: Holder(positional=(9, 8), rel_pos=(9, 8), cls=(2, 8), tokens=(9, 8), composition=(9, 8)),
        {"positional": "decays", "rel_pos": "decays", "cls": "decays", "tokens": "decays", "composition": "1"},
    ),
    "no elements": (lambda: nn.Linear(0, 8), {"weight": "decays"}),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", OF_MODULES)
def test_muon_groups_knows_what_a_module_has(name: str) -> None:
    make, expected = OF_MODULES[name]
    net = nn.ModuleDict({"inside": make(), "last": nn.Linear(8, 2)})
    assert kinds(net) == {f"inside.{name}": kind for name, kind in expected.items()} | {"last.weight": "decays"}
    NLCG(muon_groups(net, lr=0.02, weight_decay=0.1))


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def modules(**children: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(children)


# Modules, and the name of their output layer.
OUTPUT_LAYERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "the last": (lambda: modules(a=linear(), b=linear(), norm=nn.LayerNorm(8)), "b.weight"),
    "before an embedding": (lambda: modules(a=linear(), b=linear(), table=nn.Embedding(9, 8)), "b.weight"),
    "none after a convolution": (lambda: modules(a=linear(), b=nn.Conv1d(8, 8, 3)), None),
    "none after attention": (lambda: modules(a=linear(), b=nn.MultiheadAttention(8, 2)), None),
    "normed": (lambda: modules(a=linear(), b=weight_norm(linear())), "b.parametrizations.weight.original1"),
    "a head before the body": (lambda: modules(lm_head=linear(), a=linear(), b=linear()), "lm_head.weight"),
    "of two heads the last": (lambda: modules(head=linear(), head_dist=linear(), a=linear()), "head_dist.weight"),
    "in a head": (lambda: modules(classifier=nn.Sequential(linear(), linear()), a=linear()), "a.weight"),
    "in a head before the body": (
        lambda: modules(classifier=nn.Sequential(linear(), linear()), body=nn.Sequential(nn.Sequential(linear()))),
        "classifier.1.weight",
    ),
    "after a head that has none": (lambda: modules(head=nn.Conv1d(8, 8, 3), fc=linear()), "fc.weight"),
    "not in a layer": (
        lambda: modules(layers=nn.ModuleList([modules(output=linear(), up=linear()) for _ in range(2)])),
        "layers.1.up.weight",
    ),
    "in a wrapper": (lambda: modules(module=modules(head=linear(), a=linear())), "module.head.weight"),
    "alone": (linear, "weight"),
}


@pytest.mark.parametrize("name", OUTPUT_LAYERS)
def test_the_output_layer_is_outside(name: str) -> None:
    make, expected = OUTPUT_LAYERS[name]
    found = {name: kind for name, kind in kinds(make()).items() if "table" not in name and "original0" not in name}
    assert [name for name, kind in found.items() if kind == "decays"] == ([] if expected is None else [expected])


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, functools.partial(torch.compile, backend="eager")])
def test_wrappers_do_not_count(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Names are matched without the parts that wrappers and parametrizations add, and ``param_names`` keep them."""
    net = modules(pos_embed=Holder(table=(9, 8)), qkv=weight_norm(nn.Linear(8, 24)), up=linear(), head=linear())
    expected = kinds(net, outside=["up"], split={"qkv.weight": 3})
    assert expected["pos_embed.table"] == expected["up.weight"] == "decays"
    assert expected["qkv.parametrizations.weight.original1"] == "3"
    for name in ("pos_embed", "qkv", "up"):
        net[name] = wrap(net[name])
    found = kinds(net, outside=["up"], split={"qkv.weight": 3})
    assert list(found.values()) == list(expected.values())
    assert found.keys() == {name for name, p in net.named_parameters() if p.dim() >= 2}
    given = next(name for name in found if name.endswith("original1"))
    assert kinds(net, outside=["up"], split={given: 3}) == found


@pytest.mark.parametrize("embedding", [lambda: nn.Embedding(30, 16), lambda: Holder(weight=(30, 16))])
@pytest.mark.parametrize("first", [True, False])
def test_a_weight_tied_to_an_embedding_is_outside(embedding: Callable[[], nn.Module], first: bool) -> None:
    tied = {"lm_head": nn.Linear(16, 30), "embed_tokens": embedding()}
    tied["lm_head"].weight = tied["embed_tokens"].weight
    net = modules(**tied) if first else modules(**dict(reversed(tied.items())))
    net["last"] = nn.Linear(16, 4)
    assert set(kinds(net, outside=["last"]).values()) == {"decays"}


def test_outside_is_chosen() -> None:
    groups = muon_groups(Model(), lr=0.02, weight_decay=0.1, outside=("stem", "experts", "frozen"))
    assert {"stem.weight", "experts"} <= names(groups, preconditioner="adam")
    assert "head.weight" in names(groups, preconditioner="muon")


def test_a_split_may_be_of_numpys_numbers_and_of_what_is_frozen() -> None:
    groups = muon_groups(
        Model(),
        lr=0.02,
        weight_decay=0.1,
        split={"qkv.weight": np.int64(3), "frozen.weight": 2, "token_mixer.weight": [4, np.int32(5)]},
    )
    assert "qkv.weight" in names(groups, split=3)
    assert names(groups, split=(4, 5)) == {"token_mixer.weight"}
    assert all(type(group.get("split")) is not np.int64 for group in groups)


class Conv1D(Holder):
    """As in transformers: x @ weight + bias."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"outside": ("sten",)}, ValueError, "outside has 'sten', which names no parameter"),
        ({"outside": "stem"}, TypeError, "outside must be None or a sequence of names, got the string 'stem'"),
        (
            {"split": {"kv.weight": 2}},
            ValueError,
            "split has 'kv.weight', with which the name of no matrix inside ends",
        ),
        ({"split": {"head.weight": 2}}, ValueError, "split has 'head.weight', with which the name of no matrix"),
        ({"split": {"qkv.bias": 3}}, ValueError, "split has 'qkv.bias', with which the name of no matrix"),
        ({"split": {"qkv.weight": 5}}, ValueError, r"'qkv.weight': .* cannot be split into 5 parts of equal size"),
        ({"split": {"qkv.weight": (16, 16)}}, ValueError, r"'qkv.weight': .* into parts of \(16, 16\) rows: it has 48"),
        ({"split": {"qkv.weight": "3"}}, TypeError, "split must be None, an int or a sequence of ints, got '3'"),
        ({"split": {"c_attn.weight": 3}}, ValueError, "split cannot cut 'c_attn.weight': its rows are the inputs"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay"),
    ],
)
def test_muon_groups_refuses_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    net = Model()
    net.c_attn, net.head = Conv1D(weight=(12, 36), bias=(36,)), net.head
    with pytest.raises(error, match=message):
        muon_groups(net, **{"lr": 0.02, "weight_decay": 0.1, **arguments})


class Flat(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(32))


@pytest.mark.filterwarnings(
    "ignore:Lazy modules are a new feature", "ignore:.*torch.jit.script.* is:DeprecationWarning"
)
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), linear()), ValueError, "parameter '0.weight' is not initialized"),
        (lambda: nn.Sequential(Flat(), linear()), ValueError, r"parameter '0.weight' of shape \(32,\) is a flat shard"),
        (lambda: nn.Sequential(torch.jit.script(linear())), TypeError, "module '0' is one of torch.jit"),
        (lambda: [nn.Parameter(torch.zeros(3, 4))], TypeError, "module must be an nn.Module, got list"),
    ],
)
def test_muon_groups_refuses_modules_without_matrices(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        muon_groups(make(), lr=0.02, weight_decay=0.1)
