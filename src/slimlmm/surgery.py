"""Cut a model along one axis for good (`cut`), or let it compute the same with nothing cut (`masked`).

Both take the same units, but share no arithmetic: `cut` slices rows and rebuilds the stock class, `masked`
zeroes what writes a dropped unit (or reads it) in the full model. That they agree is the proof of a cut, see
`selfcheck`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy, Axis, Group, Keep, Slot
from slimlmm.errors import UserError
from slimlmm.families import family_of, stock_class
from slimlmm.importance import skipped
from slimlmm.resizing import resized
from slimlmm.token_ids import renumbered


def cut(model: PreTrainedModel, anatomy: Anatomy, axis: str, keep: Keep) -> PreTrainedModel:
    """Return a new stock model that holds only the units in `keep` along `axis`; `model` stays untouched.

    The new size follows from `keep`. Width cuts of RMSNorm towers are made exact (`_compensate`). Dtypes,
    ties, the generation config, train or eval mode and ``requires_grad`` come along. Keep-all gives an equal
    model. Cutting "vocab" renumbers the token ids of the configs; `vocab.trim` does it together with the
    tokenizer.
    """
    found = anatomy.axis(axis)
    size = check(found, keep)
    config = new_config(model.config, found, size, keep)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in anatomy.tied}
    renamed, parts = new_names(found, keep, state), by_parameter(found)
    new = {
        renamed[name]: sliced(parts[name], size, keep, name, tensor).to(tensor.dtype) if name in parts else tensor
        for name, tensor in state.items()
        if name in renamed
    }
    buffers = {renamed.get(name, name): buffer for name, buffer in model.named_buffers()}
    student = _assemble(model, config, new, renamed, buffers)
    if found.kind == "vocab":
        ids = {old: index for index, old in enumerate(keep["vocab"].tolist())}
        for key, value in renumbered(model.generation_config.to_dict(), ids, found.size).items():
            setattr(student.generation_config, key, value)
    return student


def by_parameter(axis: Axis) -> dict[str, Axis]:
    """Return for every parameter with slots on `axis` the same axis with that parameter's slots alone."""
    groups: dict[str, list[Group]] = {}
    for group in axis.groups:
        slots: dict[str, list[Slot]] = {}
        for slot in group.slots:
            slots.setdefault(slot.parameter, []).append(slot)
        for name, own in slots.items():
            groups.setdefault(name, []).append(replace(group, slots=tuple(own)))
    return {name: replace(axis, groups=tuple(found)) for name, found in groups.items()}


def sliced(part: Axis, size: int, keep: Keep, name: str, tensor: Tensor) -> Tensor:
    """Return what a cut to `size` leaves of one parameter; `part` is the axis with its slots alone (`by_parameter`).

    Rows are taken in the tensor's own number format; what has to be made up for (`_compensate`) is multiplied in at least
    fp32, and so the result comes back, for the caller to round once, when all is done.
    """
    for (_, dim), rows in _kept_rows(part, keep).items():
        tensor = tensor.index_select(dim, rows.to(tensor.device))
    if not tensor.is_floating_point():
        return tensor
    state = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))}
    del tensor  # the largest are gigabytes
    _compensate(part, size, state)
    return state[name]


def _kept_rows(axis: Axis, keep: Keep) -> dict[tuple[str, int], Tensor]:
    """Return the rows that stay of every parameter and dimension, in storage order."""
    rows: dict[tuple[str, int], list[Tensor]] = {}
    for group in axis.groups:
        for slot in group.slots:
            rows.setdefault((slot.parameter, slot.dim), []).append(slot.rows(keep[group.name].cpu(), group.units))
    return {place: torch.cat(parts).sort().values if len(parts) > 1 else parts[0] for place, parts in rows.items()}


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
        if not group.allows(set(units.tolist())):
            raise UserError(
                f"{group.name}: of each of these sets one unit must stay: {list(map(list, group.some_of))}."
            )
        sizes.add(len(units) * group.stride / group.rate)
    if len(sizes) > 1 or not sizes or next(iter(sizes)) % 1:
        raise UserError(f"{axis.name}: the groups ask for different sizes: {sorted(sizes)}.")
    return int(sizes.pop())


def new_config(config: Any, axis: Axis, size: int, keep: Keep) -> Any:
    """Return the stock configuration of the cut model, token ids and lists per block along with the sizes."""
    if axis.kind == "vocab":
        config = _renumbered_config(config, keep["vocab"].tolist(), axis.size)
    blocks = {name: units.tolist() for name, units in keep.items()} if axis.kind == "blocks" else None
    return resized(config, {axis.name: size}, blocks)


def _renumbered_config(config: Any, ids: list[int], size: int) -> Any:
    """Return `config` with the token ids of its top level and its text part renumbered."""
    new = {old: index for index, old in enumerate(ids)}
    data = config.to_dict()
    data.pop("transformers_version", None)
    for key, part in family_of(config).token_data(data).items():
        changed = renumbered(part, new, size)
        data |= {key: changed} if key else changed
    return type(config).from_dict(data)


def new_names(axis: Axis, keep: Keep, state: Iterable[str]) -> dict[str, str]:
    """Map the names of the tensors in `state` that stay to their new names; they differ only behind a dropped block."""
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
    """Make a cut of the width equal the full model with dropped channels zero, where RMSNorms read the stream.

    With c = sqrt(H'/H) what writes the stream is scaled by c: then sum (c x)^2 / H' = sum x^2 / H, and every norm divides
    by what it divided by before, its epsilon included. A norm that is read by the blocks ("rms") has c too much, so its
    weight is divided by c. One whose output is the stream ("post") keeps its weight. An embedding that the model multiplies
    by sqrt(H') has its c already. A head tied to a scaled embedding has another c, taken out of the norm before it ("last").
    In a tower of LayerNorms, which divide by another sum anyway, nothing that writes is scaled.
    """
    c = math.sqrt(size / axis.size)
    factors = {"write": c, "read": 1 / c, "rms": 1 / c, "rms1": 1 / c, "last": 1 / c**2, "last1": 1 / c**2}
    for name, norm in {(slot.parameter, slot.norm) for group in axis.groups for slot in group.slots}:
        if norm not in factors:
            continue
        one = int(norm.endswith("1"))  # Gemma's norms hold w - 1
        state[name] = (state[name] + one) * factors[norm] - one if one else state[name] * factors[norm]


def _assemble(
    model: PreTrainedModel,
    config: Any,
    state: Mapping[str, Tensor],
    renamed: Mapping[str, str],
    buffers: Mapping[str, Tensor],
) -> PreTrainedModel:
    """Build the stock class of `config` around these tensors; it shares no storage with `model`."""
    with torch.device("meta"):
        student: PreTrainedModel = stock_class(config).from_config(config, attn_implementation=_attention(model.config))
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    own = {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in state.items()}
    missing, unexpected = student.load_state_dict(own, strict=False, assign=True)
    student.tie_weights()
    _fill_buffers(student, buffers)
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


def _attention(config: Any) -> dict[str, str]:
    """Return the attention implementation of a configuration and of its parts, which need not be the same."""
    parts = {"": config, **{key: getattr(config, key) for key in config.sub_configs}}
    return {key: part._attn_implementation for key, part in parts.items() if part is not None}


def _fill_buffers(student: PreTrainedModel, buffers: Mapping[str, Tensor]) -> None:
    """Fill what no checkpoint holds (rotary frequencies, position numbers, the root of the width) as loading does."""
    for _, tensor in (*student.named_parameters(), *student.named_buffers()):
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]
    for name, buffer in list(student.named_buffers()):
        if buffer.is_meta:
            old, (parent, _, leaf) = buffers.get(name), name.rpartition(".")
            same = old is not None and old.shape == buffer.shape
            new = old.detach().clone() if old is not None and same else torch.full_like(buffer, math.nan, device="cpu")
            setattr(student.get_submodule(parent), leaf, nn.Buffer(new, persistent=False))
    student.initialize_weights()
    unknown = [name for name, b in student.named_buffers() if b.is_floating_point() and b.isnan().any()]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: of another size now, and the stock class does not compute it anew.")


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
                    _narrow(model, slot, slot.rows(keep[group.name].cpu(), group.units), stack)
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


def _narrow(model: PreTrainedModel, slot: Slot, kept: Tensor, stack: ExitStack) -> None:
    """Let one LayerNorm take mean and variance over the kept channels and put out zeros elsewhere."""
    norm: Any = model.get_submodule(slot.parameter.rpartition(".")[0])
    eps = norm.eps if "eps" in vars(norm) else norm.variance_epsilon

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = kept.to(output.device)
        x = args[0][..., rows]
        mean = x.mean(-1, keepdim=True)
        y = (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps)
        y = y * module.weight[rows]
        if getattr(module, "bias", None) is not None:
            y = y + module.bias[rows]
        return torch.zeros_like(output).index_copy(-1, rows, y.to(output.dtype))

    stack.callback(norm.register_forward_hook(hook).remove)


def _skip_blocks(model: PreTrainedModel, axis: Axis, keep: Keep, stack: ExitStack) -> None:
    group = axis.groups[0]
    for unit in _complement(keep[group.name], group.units).tolist():
        for layer in range(unit * group.stride, (unit + 1) * group.stride):
            block = model.get_submodule(f"{axis.layers}.{layer}")
            stack.enter_context(skipped([block]))
