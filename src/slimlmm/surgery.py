"""Cut a model along one axis for good (`cut`), or let it compute the same with nothing cut (`masked`).

Both take the same units, but share no arithmetic: `cut` slices rows and rebuilds the stock class, `masked`
zeroes what writes a dropped unit (or reads it) in the full model. That they agree is the proof of a cut, see
`selfcheck`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from slimlmm.anatomy import resized
from slimlmm.axes import Anatomy, Axis, Group, Keep, Slot
from slimlmm.errors import UserError
from slimlmm.families import backbone_of, family_of
from slimlmm.probing import Field, edited, get
from slimlmm.token_ids import renumbered

_MODELS: Any = AutoModelForImageTextToText


def cut(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep) -> PreTrainedModel:
    """Return a new stock model that holds only the units in `keep` along `axis`; `model` stays untouched.

    The new size follows from `keep`. Width cuts of RMSNorm towers are made exact (`_compensate`). Dtypes,
    ties, the generation config, train or eval mode and ``requires_grad`` come along. Keep-all gives an equal
    model. Cutting "vocab" renumbers the token ids of the configs; `vocab.trim` does it together with the
    tokenizer.
    """
    found = anatomy.axis(axis)
    size = check(found, keep)
    config = _new_config(model.config, found, size, keep)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in anatomy.tied}
    renamed = _renamed(found, keep, state)
    new = {renamed[name]: tensor for name, tensor in state.items() if name in renamed}
    for group in found.groups:
        for slot in group.slots:
            rows = slot.rows(keep[group.name].cpu(), group.units).to(new[slot.parameter].device)
            new[slot.parameter] = new[slot.parameter].index_select(slot.dim, rows)
    _compensate(found, size, new)
    buffers = {renamed.get(name, name): buffer for name, buffer in model.named_buffers()}
    student = _assemble(model, config, new, renamed, buffers)
    if found.kind == "vocab":
        ids = {old: index for index, old in enumerate(keep["vocab"].tolist())}
        for key, value in renumbered(model.generation_config.to_dict(), ids, found.size).items():
            setattr(student.generation_config, key, value)
    return student


def check(axis: Axis, keep: Keep) -> int:
    """Return the size that `keep` asks for, having checked that it is a legal choice for every group."""
    names = {group.name for group in axis.groups}
    if set(keep) != names:
        raise UserError(
            f"{axis.name}: needs a choice for {len(names)} groups; missing {sorted(names - set(keep))[:3]}, "
            f"not its own {sorted(set(keep) - names)[:3]}."
        )
    sizes = set()
    for group in axis.groups:
        units = keep[group.name]
        ordered = bool((units[1:] > units[:-1]).all())
        if not len(units) or not ordered or int(units[0]) < 0 or int(units[-1]) >= group.units:
            raise UserError(f"{group.name}: kept units must be sorted, unique, and within 0..{group.units - 1}.")
        sizes.add(len(units) * group.stride / group.rate)
    if len(sizes) > 1 or not sizes or next(iter(sizes)) % 1:
        raise UserError(f"{axis.name}: the groups ask for different sizes: {sorted(sizes)}.")
    return int(sizes.pop())


def _new_config(config: Any, axis: Axis, size: int, keep: Keep) -> Any:
    if axis.kind == "vocab":
        config = _renumbered_config(config, keep["vocab"].tolist(), axis.size)
    blocks = {name: units.tolist() for name, units in keep.items()} if axis.kind == "blocks" else None
    new = resized(config, {axis.name: size}, blocks)
    eps = _epsilon(config, axis)
    if eps is not None:
        new = edited(new, {eps: get(config, eps) * axis.size / size})
    return new


def _renumbered_config(config: Any, ids: list[int], size: int) -> Any:
    """Return `config` with the token ids of its top level and its text part renumbered."""
    new = {old: index for index, old in enumerate(ids)}
    data = config.to_dict()
    data.pop("transformers_version", None)
    part = family_of(config).tower("text").config
    data = renumbered(data, new, size) | {part: renumbered(data[part], new, size)}
    return type(config).from_dict(data)


def _epsilon(config: Any, axis: Axis) -> Field | None:
    """Return the field of the norms' epsilon when a cut of this axis changes what they average over."""
    if axis.kind != "width":
        return None
    tower = family_of(config).tower(axis.name.partition(".")[0])
    backbone = backbone_of(config, tower)
    return (tower.config, backbone.eps) if backbone is not None and backbone.eps else None


def _renamed(axis: Axis, keep: Keep, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the names of the tensors that stay to their new names; they differ only behind a dropped block."""
    if axis.kind != "blocks":
        return {name: name for name in state}
    group = axis.groups[0]
    layers = [int(unit) * group.stride + i for unit in keep[group.name] for i in range(group.stride)]
    place = {str(old): str(new) for new, old in enumerate(layers)}
    prefix, renamed = f"{axis.layers}.", {}
    for name in state:
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            renamed[name] = name
        elif layer in place:
            renamed[name] = f"{prefix}{place[layer]}.{rest}"
    return renamed


def _compensate(axis: Axis, size: int, state: dict[str, Tensor]) -> None:
    """Scale RMSNorm weights: the cut norm then equals the full norm of a stream whose dropped channels are 0.

    w x / sqrt(sum(x^2)/H + e) = w' x / sqrt(sum(x^2)/H' + e')  for  w' = w sqrt(H/H'), e' = e H/H'. With S =
    sum(x^2): S/H' + e' = (H/H') (S/H + e), so the right side has to be larger by sqrt(H/H').
    """
    scale = math.sqrt(axis.size / size)
    for name in {slot.parameter for group in axis.groups for slot in group.slots if slot.norm == "rms"}:
        state[name] = state[name] * scale


def _assemble(
    model: PreTrainedModel,
    config: Any,
    state: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    buffers: Mapping[str, Tensor],
) -> PreTrainedModel:
    """Build the stock class of `config` around these tensors; it shares no storage with `model`."""
    with torch.device("meta"):
        attention = {"attn_implementation": model.config._attn_implementation}
        student: PreTrainedModel = _MODELS.from_config(config, **attention)
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    own = {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in state.items()}
    missing, unexpected = student.load_state_dict(own, strict=False, assign=True)
    student.tie_weights()
    for name, buffer in list(student.named_buffers()):
        if buffer.is_meta:  # not in the state dict: rotary frequencies, position numbers; no cut changes them
            parent, _, leaf = name.rpartition(".")
            setattr(
                student.get_submodule(parent),
                leaf,
                nn.Buffer(buffers[name].detach().clone(), persistent=False),
            )
    left = [name for name, tensor in student.named_parameters() if tensor.is_meta]
    assert not unexpected, unexpected
    assert not left, (left, missing)
    trained = {renamed[name]: p.requires_grad for name, p in model.named_parameters() if name in renamed}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained[name])
    student.generation_config = copy.deepcopy(model.generation_config)
    student.name_or_path = model.name_or_path
    student.config.dtype = model.config.dtype
    student.train(model.training)
    return student


@contextmanager
def masked(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep) -> Iterator[PreTrainedModel]:
    """Let `model` compute, inside the with-block, what it would compute without the units outside `keep`.

    Nothing is cut and nothing rebuilt. Blocks are skipped. Dropped inner units are not read. Dropped channels
    of a residual stream are never written; RMSNorm sees their zeros and still averages over all channels,
    LayerNorm sees the kept ones alone. Dropped tokens change nothing, they never occur. Run backward inside
    the block too: weights are changed in place and put back at its end.
    """
    found = anatomy.axis(axis)
    check(found, keep)
    with ExitStack() as stack:
        if found.kind == "blocks":
            _skip_blocks(model, found, keep, stack)
        for group in found.groups if found.kind != "vocab" else ():
            dropped = _complement(keep[group.name], group.units)
            width = found.kind == "width" and group.name == found.name
            for slot in group.slots:
                if slot.role == ("produce" if width else "consume"):
                    _zero(model, slot, group, dropped, stack)
                if slot.norm == "layer" and slot.parameter.endswith("weight"):
                    _narrow(model, slot, keep[group.name], stack)
        yield model


def _complement(keep: Tensor, units: int) -> Tensor:
    dropped = torch.ones(units, dtype=torch.bool)
    dropped[keep.cpu()] = False
    return dropped.nonzero().flatten()


def _zero(model: PreTrainedModel, slot: Slot, group: Group, dropped: Tensor, stack: ExitStack) -> None:
    """Zero what the dropped units own of one parameter until the stack unwinds."""
    parameter = model.get_parameter(slot.parameter)
    before = parameter.detach().clone()
    stack.callback(_restore, parameter, before)
    with torch.no_grad():
        parameter.index_fill_(slot.dim, slot.rows(dropped, group.units).to(parameter.device), 0.0)


@torch.no_grad()
def _restore(parameter: nn.Parameter, before: Tensor) -> None:
    parameter.copy_(before)


def _narrow(model: PreTrainedModel, slot: Slot, keep: Tensor, stack: ExitStack) -> None:
    """Let one LayerNorm take mean and variance over the kept channels and put out zeros elsewhere."""
    norm = model.get_submodule(slot.parameter.rpartition(".")[0])
    assert isinstance(norm, nn.LayerNorm)

    def hook(module: nn.LayerNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept = keep.to(output.device)
        x = args[0][..., kept]
        mean = x.mean(-1, keepdim=True)
        y = (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + module.eps)
        y = y * module.weight[kept] + module.bias[kept]
        return torch.zeros_like(output).index_copy(-1, kept, y.to(output.dtype))

    stack.callback(norm.register_forward_hook(hook).remove)


def _skip_blocks(model: PreTrainedModel, axis: Axis, keep: Keep, stack: ExitStack) -> None:
    group = axis.groups[0]
    for unit in _complement(keep[group.name], group.units).tolist():
        for layer in range(unit * group.stride, (unit + 1) * group.stride):
            block = model.get_submodule(f"{axis.layers}.{layer}")
            stack.callback(block.register_forward_hook(_passed_on(), with_kwargs=True, prepend=True).remove)


def _passed_on() -> Callable[..., Any]:
    """Return a hook that makes a block hand on the hidden states that it was given."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook
