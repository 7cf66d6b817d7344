"""The parameter groups of ``preconditioner="muon"``: which parameters of a module are matrices inside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # the out_proj of nn.MultiheadAttention
from torch.nn.parameter import is_lazy

from fastnlcg.options import Options, check_real
from fastnlcg.tensors.matrices import shape_of
from fastnlcg.tensors.state_dict import WRAPPERS

__all__ = ["muon_groups"]

_CONVOLUTION = nn.modules.conv._ConvNd
_LAYERS = (nn.Linear, _CONVOLUTION, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Their parameters are matrices or biases, whatever the names of the modules."""
_EMBEDDING = re.compile(r"embed|token|(^|_)(position|(pos|cls|wte|wpe)(_|$))")
"""Names of parameters of other modules, or names of those modules."""
_BIAS = re.compile(r"^bias|bias(es)?$")
_NORM_CLASS = re.compile(r"norm\d*d?$", re.IGNORECASE)
_OUTPUT = re.compile(r"(classifier|output|fc_out|head|head_\w+|\w+_head)(\.|$)")
"""Names of the modules that are output layers or hold one."""
_WHOLE = "expected whole matrices or DTensors, as of FSDP2 (torch.distributed.fsdp.fully_shard)"
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
    You give one learning rate, Muon's: the ``"adam"`` groups get a tenth of it, and ten times the weight decay, so that
    they move and decay as under AdamW with the rate ``lr``.

    Matrices are the weights of linear layers, of convolutions (out x the rest), of recurrent layers (one matrix for
    each gate), of ``nn.MultiheadAttention`` (query, key and value apart), and the parameters of other modules: of two
    dimensions, or of more, which are stacks (the last two dimensions, as of experts). These are not taken for matrices:

    - **Embeddings**: those of ``nn.Embedding``, and those of modules other than the layers above if their own name or
      their module's contains ``embed`` or ``token``, or has a word that begins with ``position`` or is ``pos``,
      ``cls``, ``wte`` or ``wpe``. A parameter that is shared with an embedding is one.
    - **Biases and normalizations**, of any shape: parameters whose name begins or ends with ``bias``, and those of
      classes whose name, or a base's, ends in ``Norm``, as ``LayerNorm`` or ``BatchNorm2d``.
    - **Vectors**: matrices, or parts of one, that have one row or one column, and depthwise convolutions.

    What ``torch.compile``, activation checkpointing and parametrizations add to names does not count. Frozen parameters
    are left out.

    Args:
        module: the module with the parameters, after ``fully_shard``.
        lr: the learning rate of the matrices, >= 0, as for ``torch.optim.Muon`` with
            ``adjust_lr_fn="match_rms_adamw"``: AdamW's rates.
        weight_decay: >= 0, decoupled, of all parameters except biases, normalizations and those of one dimension.
            Every group gets its own, so ``NLCG``'s would have no effect.
        outside: names of modules or parameters whose matrices get ``"adam"`` in addition to embeddings. None: the
            output layer. There are two candidates: the last module with a matrix, and the last one inside a child of
            ``module`` that is named ``classifier``, ``output``, ``fc_out``, ``head``, ``head_*`` or ``*_head``. If one
            of them alone is an ``nn.Linear``, it is the output layer. If both are, it is the one nested less deeply;
            in all other cases it is the one inside that child.
        split: for fused projections: by the end of a parameter's name, the number of parts of equal size, or the rows
            of each part: ``{"qkv.weight": 3}``, ``{"in_proj.weight": (4096, 1024, 1024)}``.

    Returns:
        Groups for ``NLCG(muon_groups(model, lr=0.02, weight_decay=0.1))``; each has its own lr and weight decay, and
        ``param_names``. Empty groups are left out.

    Raises:
        ValueError: if a name in ``outside`` fits no parameter, if a name in ``split`` fits no matrix inside, if a split
            does not fit its parameter or would cut a module's inputs, or if a parameter is not initialized (lazy
            modules) or a flat shard (FSDP1).
        TypeError: if an argument is of the wrong kind, or a module is one of ``torch.jit``, which hide their classes.

    Source: K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (which layers); Liu et al.,
    arXiv:2502.16982, section 2.2 (one rate for both).
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if isinstance(outside, str):
        raise TypeError(f"outside must be None or a sequence of names, got the string {outside!r}")
    lr, weight_decay = check_real("lr", lr, minimum=0.0), check_real("weight_decay", weight_decay, minimum=0.0)
    split = dict(split or {})
    occurrences = _occurrences(module)
    left_out = _output_layer(occurrences) if outside is None else list(outside)
    for name in left_out:
        if not any(_is_in(name, occurrence) for occurrence in occurrences):
            raise ValueError(f"outside has {name!r}, which names no parameter of the module")

    of_parameter: dict[nn.Parameter, list[_Occurrence]] = {}
    for occurrence in occurrences:
        of_parameter.setdefault(occurrence.p, []).append(occurrence)
    used: set[str | None] = set()
    matrices: dict[Any, dict[str, Any]] = {}
    rest: dict[bool, dict[str, Any]] = {}
    for index, (p, owned) in enumerate(of_parameter.items()):
        ending = next((ending for ending in split if any(_ends_with(occurrence, ending) for occurrence in owned)), None)
        if not p.requires_grad:
            used.add(ending)
            continue
        inside = not any(_is_in(name, occurrence) for name in left_out for occurrence in owned)
        kinds = (
            [_kind(index, occurrence, split[ending] if ending else None) for occurrence in owned] if inside else [None]
        )
        if (kind := kinds[0]) is None or None in kinds:
            decays = p.dim() >= 2 and not any(map(_is_bias_or_norm, owned))
            group = rest.setdefault(
                decays,
                {
                    "params": [],
                    "param_names": [],
                    "lr": lr * REST_LR,
                    "weight_decay": weight_decay / REST_LR if decays else 0.0,
                    "preconditioner": "adam",
                },
            )
        else:
            used.add(ending)
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
        group["param_names"].append(owned[0].given)
    for ending in split:
        if ending not in used:
            raise ValueError(f"split has {ending!r}, with which the name of no matrix inside ends")
    return [*matrices.values(), *rest.values()]


class _Occurrence(NamedTuple):
    """A parameter in the module that owns it. A shared parameter has several."""

    p: nn.Parameter
    given: str
    """its name as of ``named_parameters()``"""
    name: str
    """without wrappers and parametrizations"""
    owner: nn.Module


def _occurrences(module: nn.Module) -> list[_Occurrence]:
    """Every parameter, in each of its occurrences. TypeError or ValueError if its kind cannot be told."""
    owners = {}
    for given, owner in module.named_modules(remove_duplicate=False):
        owners[_plain(given)] = owner  # of a wrapper and the module in it, which comes later, the latter
        if isinstance(owner, torch.jit.ScriptModule):
            raise TypeError(
                f"module {given!r} is one of torch.jit, which hide their classes: make the groups before "
                "torch.jit.script or trace, which keep the parameters"
            )
        if "_fsdp_wrapped_module" in given.split("."):
            raise ValueError(f"module {given!r} is wrapped by FSDP1, which keeps flat shards; {_WHOLE}")
    occurrences = []
    for given, p in module.named_parameters(remove_duplicate=False):
        name = _plain(given)
        occurrence = _Occurrence(p, given, name, owners[name.rpartition(".")[0]])
        if is_lazy(p):
            raise ValueError(f"parameter {given!r} is not initialized: call the module on a batch first")
        if p.dim() < 2 and name.endswith("weight") and isinstance(occurrence.owner, (nn.Linear, _CONVOLUTION)):
            raise ValueError(f"parameter {given!r} of shape {tuple(p.shape)} is a flat shard; {_WHOLE}")
        occurrences.append(occurrence)
    return occurrences


def _output_layer(occurrences: Sequence[_Occurrence]) -> list[str]:
    """The name of the output layer, if there is one; see ``outside`` of :func:`muon_groups`."""
    names: dict[nn.Module, str] = {}
    for occurrence in occurrences:
        if occurrence.p.dim() >= 2 and not _is_embedding(occurrence) and not _is_bias_or_norm(occurrence):
            names.setdefault(occurrence.owner, occurrence.name.rpartition(".")[0])
    columns = zip(*(occurrence.name.split(".") for occurrence in occurrences), strict=False)
    outer = len(list(itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)))  # DDP's "module", for example
    usual = [owner for owner, name in names.items() if _OUTPUT.match(".".join(name.split(".")[outer:]))]
    last = [
        names[owner]
        for owner in (*usual[-1:], *list(names)[-1:])
        if isinstance(owner, nn.Linear) and not isinstance(owner, NonDynamicallyQuantizableLinear)
    ]
    return [min(last, key=lambda name: name.count("."))] if last else []


def _kind(index: int, occurrence: _Occurrence, split: Any) -> dict[str, Any] | None:
    """How a parameter is matrices: the options of its group; None if it is not. ``split``: the
    caller's, or None."""
    p, owner = occurrence.p, occurrence.owner
    if p.dim() < 2 or p.numel() == 0 or _is_embedding(occurrence) or _is_bias_or_norm(occurrence):
        return None
    if isinstance(owner, _CONVOLUTION) and owner.groups == owner.in_channels > 1:  # depthwise
        return None
    if split is not None and _has_rows_of_inputs(occurrence):
        raise ValueError(
            f"split cannot cut {occurrence.given!r}: its rows are the inputs of its module, not the outputs"
        )
    parts = _fused(p, owner) if split is None else split
    options = Options(preconditioner="muon", stacked=p.dim() > 2 and not isinstance(owner, _CONVOLUTION), split=parts)
    try:
        shape = shape_of(index, p, options)
    except ValueError as error:
        raise ValueError(f"{occurrence.given!r}: {error}") from error
    if max(shape.rows) == 1 or shape.columns == 1:
        return None
    return {"stacked": options.stacked, "split": None if options.split == 1 else options.split}


def _fused(p: Tensor, owner: nn.Module) -> int:
    """Into how many parts torch's modules split a parameter: gates; query, key and value."""
    rows: int = p.shape[0]
    width = rows
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        width = owner.hidden_size
    elif isinstance(owner, nn.MultiheadAttention):
        width = owner.embed_dim
    return max(rows // width, 1)


def _has_rows_of_inputs(occurrence: _Occurrence) -> bool:
    """Whether a weight is (in, out), as that of Conv1D in transformers: there are as many biases as outputs."""
    bias = getattr(occurrence.owner, "bias", None)
    if occurrence.name.rpartition(".")[2] != "weight" or not isinstance(bias, Tensor):
        return False
    return occurrence.p.shape[0] != bias.numel() == occurrence.p.shape[1]


def _is_embedding(occurrence: _Occurrence) -> bool:
    if isinstance(occurrence.owner, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return not isinstance(occurrence.owner, _LAYERS) and any(map(_EMBEDDING.search, occurrence.name.split(".")[-2:]))


def _is_bias_or_norm(occurrence: _Occurrence) -> bool:
    if _BIAS.search(occurrence.name.rpartition(".")[2]):
        return True
    return any(_NORM_CLASS.search(base.__name__) for base in type(occurrence.owner).__mro__)


_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")


def _plain(name: str) -> str:
    """A name without the parts that wrappers and parametrizations have added."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return _PARAMETRIZED.sub(r"\1\2", name)


def _is_in(part: str, occurrence: _Occurrence) -> bool:
    return part == "" or f"{occurrence.name}.".startswith(f"{_plain(part)}.")


def _ends_with(occurrence: _Occurrence, ending: str) -> bool:
    return f".{occurrence.name}".endswith(f".{_plain(ending)}")
