"""The parameter groups of ``preconditioner="muon"``: which parameters of a module are matrices inside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fastnlcg.options import check_real

__all__ = ["muon_groups"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_NOT_INSIDE = re.compile(r"embed|position|token|(^|_)(pos|cls|wte|wpe)(_|$)")
"""Names of parameters, or of the modules that hold them, that are tables of vectors, not matrices."""
_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
REST_LR = 1.0 - 0.9
"""The rate of the rest over that of the matrices: a step of ``"adam"`` is up to 1 / (1 - beta_max) times as long as
AdamW's, whose rate Muon shares."""


def muon_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    outside: Iterable[str] | None = None,
    split: Mapping[str, int | Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Makes the parameter groups of ``NLCG`` for a network of matrices. The matrices inside ``module`` get
    ``preconditioner="muon"``. Embeddings, the output layer, biases, normalizations and other vectors get ``"adam"``.
    You give one learning rate, Muon's: the ``"adam"`` groups get a tenth of it, and those of embeddings and the output
    layer ten times the weight decay, so that they move and decay as under AdamW with the rate ``lr``.

    Matrices are the weights of linear layers, of convolutions (out x the rest), of recurrent layers (one matrix for
    each gate), of ``nn.MultiheadAttention`` (query, key and value apart), and the parameters of other modules: of two
    dimensions, or of more, which are stacks (the last two dimensions, as of experts). Embeddings are ``nn.Embedding``,
    and parameters of such other modules with ``embed``, ``position`` or ``token`` in their name or their module's. A
    parameter that is shared with an embedding is one. Depthwise convolutions, and matrices of one row or column, are
    vectors. Frozen parameters are left out.

    Args:
        module: the module with the parameters.
        lr: the learning rate of the matrices, >= 0, as for ``torch.optim.Muon`` with
            ``adjust_lr_fn="match_rms_adamw"``: AdamW's rates.
        weight_decay: of the matrices, >= 0, decoupled. Vectors do not decay.
        outside: names of modules or parameters whose matrices get ``"adam"`` in addition to embeddings. None: the
            output layer, which is the last module that has a matrix, if that is an ``nn.Linear``.
        split: for fused projections: by the end of a parameter's name, the number of parts of equal size, or the rows
            of each part: ``{"qkv.weight": 3}``, ``{"in_proj.weight": (4096, 1024, 1024)}``.

    Returns:
        Groups for ``NLCG(muon_groups(model, lr=0.02, weight_decay=0.1))``; each has its own lr and weight decay, and
        ``param_names``. Empty groups are left out.

    Raises:
        ValueError: if a name in ``outside`` or ``split`` fits no parameter, or a split does not fit its parameter.

    Source: K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (which layers); Liu et al.,
    arXiv:2502.16982, section 2.2 (one rate for both).
    """
    lr, weight_decay = check_real("lr", lr, minimum=0.0), check_real("weight_decay", weight_decay, minimum=0.0)
    split = dict(split or {})
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    modules = dict(module.named_modules())
    # A shared parameter has several names, and is an embedding if one of its owners is.
    tables = {
        id(p) for owner in modules.values() if isinstance(owner, _EMBEDDINGS) for p in owner.parameters(recurse=False)
    }
    if outside is None:
        with_matrix = [
            name for name, owner in modules.items() if any(p.dim() >= 2 for p in owner.parameters(recurse=False))
        ]
        left_out = [name for name in with_matrix[-1:] if isinstance(modules[name], nn.Linear)]
    else:
        left_out = list(outside)
        for name in left_out:
            if not any(_is_in(name, parameter) for parameter in named):
                raise ValueError(f"outside has {name!r}, which names no parameter of the module")
    for ending in split:
        if not any(_ends_with(name, ending) for name in named):
            raise ValueError(f"split has {ending!r}, with which no parameter's name ends")

    matrices: dict[Any, dict[str, Any]] = {}
    rest: dict[bool, dict[str, Any]] = {}
    for name, p in named.items():
        owner = modules[name.rpartition(".")[0]]
        inside = id(p) not in tables and not any(_is_in(part, name) for part in left_out)
        kind = _kind(name, p, owner) if inside else None
        if kind is None:
            group = rest.setdefault(
                p.dim() >= 2,
                {
                    "params": [],
                    "param_names": [],
                    "lr": lr * REST_LR,
                    "weight_decay": weight_decay / REST_LR if p.dim() >= 2 else 0.0,
                    "preconditioner": "adam",
                },
            )
        else:
            parts = next((split[ending] for ending in split if _ends_with(name, ending)), kind["split"])
            parts = parts if parts is None or isinstance(parts, int) else tuple(parts)
            kind = {**kind, "split": None if parts == 1 else parts}
            group = matrices.setdefault(
                tuple(kind.values()),
                {
                    "params": [],
                    "param_names": [],
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "preconditioner": "muon",
                    **kind,
                },
            )
        group["params"].append(p)
        group["param_names"].append(name)
    return [*matrices.values(), *rest.values()]


def _kind(name: str, p: nn.Parameter, owner: nn.Module) -> dict[str, Any] | None:
    """How a parameter is matrices: the options of its group; None if it is not."""
    parts = name.split(".")
    if p.dim() < 2:
        return None
    if isinstance(owner, _CONVOLUTIONS):
        depthwise = owner.groups > 1 and owner.groups == owner.in_channels
        return None if depthwise or min(p.shape[0], p[0].numel()) == 1 else {"stacked": False, "split": None}
    if isinstance(owner, nn.RNNBase):
        return {"stacked": False, "split": _GATES.get(owner.mode, 1)}
    if isinstance(owner, nn.MultiheadAttention):
        return {"stacked": False, "split": 3 if parts[-1] == "in_proj_weight" else None}
    if min(p.shape[-2:]) == 1:
        return None
    if not isinstance(owner, nn.Linear) and any(_NOT_INSIDE.search(part) for part in parts[-2:]):
        return None
    return {"stacked": p.dim() > 2, "split": None}


def _is_in(part: str, name: str) -> bool:
    return name == part or name.startswith(part + ".") or part == ""


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
