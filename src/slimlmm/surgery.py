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
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Group, Keep, Slot
from slimlmm.blocks import renamed, skipped
from slimlmm.errors import UserError
from slimlmm.families import family_of, stock_class
from slimlmm.probing import Place
from slimlmm.resizing import dead_blocks, resized
from slimlmm.token_ids import new_ids, renumbered


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
    names, parts = new_names(found, keep, state), by_parameter(found)
    new = {
        names[name]: sliced(parts[name], size, keep, name, tensor).to(tensor.dtype) if name in parts else tensor
        for name, tensor in state.items()
        if name in names
    }
    buffers = {names.get(name, name): buffer for name, buffer in model.named_buffers()}
    student = _assemble(model, config, new, names, buffers)
    if found.kind == "vocab":
        ids = new_ids(keep["vocab"].tolist(), found.groups[0])
        for key, value in renumbered(model.generation_config.to_dict(), ids, found.size).items():
            setattr(student.generation_config, key, value)
    return student


def living(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the blocks that never reach its output; itself where there are none."""
    for axis, dead in dead_blocks(model.config).items():
        anatomy = describe(model.config)
        alive = [unit for unit in range(anatomy.axis(axis).size) if unit not in dead]
        model = cut(model, anatomy, axis, {axis: torch.tensor(alive)})
    return model


def by_parameter(axis: Axis) -> dict[str, Axis]:
    """Return for every parameter that a cut of `axis` changes the same axis with that parameter's part in it alone."""
    groups: dict[str, list[Group]] = {}
    for group in axis.groups:
        slots: dict[str, list[Slot]] = {}
        for slot in group.slots:
            slots.setdefault(slot.parameter, []).append(slot)
        for name, own in slots.items():
            groups.setdefault(name, []).append(replace(group, slots=tuple(own)))
    found = {name: replace(axis, groups=tuple(own), scalars=()) for name, own in groups.items()}
    return found | {one[0]: replace(axis, groups=(), scalars=(one,)) for one in axis.scalars}


def sliced(part: Axis, size: int, keep: Keep, name: str, tensor: Tensor) -> Tensor:
    """Return what a cut to `size` leaves of one parameter; `part` is the axis with its slots alone (`by_parameter`).

    Rows are taken in the tensor's own number format; what has to be made up for (`_made_up`) is multiplied in at least fp32,
    and so the result comes back, for the caller to round once, when all is done.
    """
    rows = kept_rows(part, keep, {name: tuple(tensor.shape)})
    for (_, dim), kept in rows.items():
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return _made_up(part, size, keep, rows, tensor) if tensor.is_floating_point() else tensor


def kept_rows(axis: Axis, keep: Keep, shapes: Mapping[str, tuple[int, ...]]) -> dict[Place, Tensor]:
    """Return the rows that stay of every parameter and dimension that the axis cuts, in storage order; rows of no unit stay."""
    stays: dict[Place, Tensor] = {}
    for group in axis.groups:
        dropped = _complement(keep[group.name], group.units)
        for slot in group.slots:
            place = (slot.parameter, slot.dim)
            mask = stays.setdefault(place, torch.ones(shapes[slot.parameter][slot.dim], dtype=torch.bool))
            mask[slot.rows(dropped, group.units)] = False
    return {place: mask.nonzero().flatten() for place, mask in stays.items()}


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
    smaller = resized(config, {axis.name: size}, {name: units.tolist() for name, units in keep.items()})
    if axis.kind == "vocab":  # last: with its old ids the configuration is one that was described already
        return _renumbered_config(smaller, new_ids(keep["vocab"].tolist(), axis.groups[0]), axis.size)
    return smaller


def _renumbered_config(config: Any, new: Mapping[int, int], size: int) -> Any:
    """Return `config` with the token ids of its top level and its text part renumbered."""
    data = config.to_dict()
    data.pop("transformers_version", None)
    for key, part in family_of(config).token_data(data).items():
        changed = renumbered(part, new, size)
        data |= {key: changed} if key else changed
    return type(config)(**data)


def new_names(axis: Axis, keep: Keep, state: Iterable[str]) -> dict[str, str]:
    """Map the names of the tensors in `state` that stay to their new names; they differ only behind a dropped block."""
    if axis.kind != "blocks":
        return {name: name for name in state}
    group = axis.groups[0]
    return renamed(axis.layers, group.layers(keep[group.name].tolist()), state)


def _made_up(part: Axis, size: int, keep: Keep, rows: Mapping[Place, Tensor], tensor: Tensor) -> Tensor:
    """Make a cut of the width equal the full model with dropped channels zero, where RMSNorms read the stream.

    `rows` are the rows of each dimension that stayed in `tensor`. With c = sqrt(H'/H) what writes the stream is scaled by c:
    then sum (c x)^2 / H' = sum x^2 / H, and every norm divides by what it divided by before, its epsilon included. A norm that
    is read by the blocks ("rms") has c too much, so its weight is divided by c. One whose output is the stream ("post") keeps
    its weight. An embedding that the model multiplies by sqrt(H') has its c already. A head tied to a scaled embedding has
    another c, taken out of the norm before it ("last"). In a tower of LayerNorms, which divide by another sum anyway, nothing
    that writes is scaled. The same factors keep scores of attention when head_dim goes from H to H' (`heads.head_dim_axis`).
    """
    c = math.sqrt(size / part.size)
    factors = {"write": c, "write2": c**2, "read": 1 / c, "rms": 1 / c, "rms1": 1 / c}
    factors |= {"last": 1 / c**2, "last1": 1 / c**2}
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if part.scalars:
        return tensor.to(wide) * factors[part.scalars[0][1]]
    scales: dict[tuple[int, int], Tensor] = {}
    for group in part.groups:
        for slot in group.slots:
            if slot.norm in factors:
                stays = rows[slot.parameter, slot.dim]
                one = int(slot.norm.endswith("1"))  # Gemma's norms hold w - 1
                scale = scales.setdefault((slot.dim, one), torch.ones(len(stays), dtype=torch.float64))
                scale[torch.isin(stays, slot.rows(keep[group.name].cpu(), group.units))] = factors[slot.norm]
    for (dim, one), scale in scales.items():
        shaped = scale.view([-1 if d == dim % tensor.dim() else 1 for d in range(tensor.dim())])
        tensor = tensor.to(wide).add_(one).mul_(shaped.to(tensor.device, wide)).sub_(one)  # rows were copied when taken
    return tensor


def _assemble(
    model: PreTrainedModel,
    config: Any,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
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
    trained = {names[name]: p.requires_grad for name, p in model.named_parameters() if name in names}
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

    Nothing is cut and nothing rebuilt. Blocks are skipped. Dropped inner units are not read (dropped dimensions of queries and
    keys, which no matrix reads, not written). Dropped channels of a residual stream are never written; RMSNorm sees their zeros
    and still averages over all channels, LayerNorm sees the kept ones alone. Dropped experts get a router's score of minus
    infinity, dropped query tokens are not fed in. Dropped tokens of the vocabulary change nothing, they never occur. Run
    backward inside the block too: weights are changed in place and put back at its end.
    """
    found = anatomy.axis(axis)
    check(found, keep)
    with ExitStack() as stack:
        if found.kind == "blocks":
            _skip_blocks(model, found, keep, stack)
        if found.kind == "experts":
            stack.enter_context(_Unrouted(model, found, keep, stack))
        if found.kind == "tokens":
            _leave_out(model, found, keep, stack)
        if found.heavier_eps:
            norm: Any = model.get_submodule(found.heavier_eps)
            stack.callback(setattr, norm, "eps", norm.eps)
            norm.eps *= found.size / check(found, keep)
        for group in found.groups if found.kind in ("inner", "width") else ():
            dropped = _complement(keep[group.name], group.units)
            stream = found.kind == "width" and group.name == found.name
            for slot in group.slots:
                if slot.role == ("produce" if stream else group.masked_role):
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
    parent, _, leaf = slot.parameter.rpartition(".")
    parameter: Tensor = getattr(model.get_submodule(parent), leaf)  # or a buffer
    rows = slot.rows(dropped, group.units).to(parameter.device)
    stack.callback(_restore, parameter, slot.dim, rows, parameter.detach().index_select(slot.dim, rows))
    with torch.no_grad():
        parameter.index_fill_(slot.dim, rows, 0.0)


@torch.no_grad()
def _restore(parameter: Tensor, dim: int, rows: Tensor, before: Tensor) -> None:
    parameter.index_copy_(dim, rows, before)


class _Unrouted(TorchFunctionMode):
    """Within the block no router chooses an expert outside `keep`: its score is minus infinity, and so is its bias."""

    def __init__(self, model: PreTrainedModel, axis: Axis, keep: Keep, stack: ExitStack) -> None:
        super().__init__()
        self.dropped: dict[int, Tensor] = {}
        state = model.state_dict()
        for group in axis.groups:
            dropped = _complement(keep[group.name], group.units)
            for slot in group.slots:
                tensor = state[slot.parameter]
                if tensor.dim() == 2:  # the router: one row for each expert
                    self.dropped[tensor.data_ptr()] = dropped.to(tensor.device)
                elif tensor.dim() == 1:  # what is added to its scores before the best are taken
                    stack.callback(tensor.copy_, tensor.clone())
                    tensor[dropped.to(tensor.device)] = -math.inf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].data_ptr() in self.dropped:
            return found.index_fill(-1, self.dropped[args[1].data_ptr()], -math.inf)
        return found


def _leave_out(model: PreTrainedModel, axis: Axis, keep: Keep, stack: ExitStack) -> None:
    """Let the model hold its learned query tokens without the dropped ones until the stack unwinds."""
    for group in axis.groups:
        stays = torch.zeros(group.units, dtype=torch.bool)
        stays[keep[group.name].cpu()] = True
        for slot in group.slots:
            module, _, leaf = slot.parameter.rpartition(".")
            owner, parameter = model.get_submodule(module), model.get_parameter(slot.parameter)
            stack.callback(setattr, owner, leaf, parameter)
            fed = parameter.detach().movedim(slot.dim, 0)[stays.to(parameter.device)].movedim(0, slot.dim)
            setattr(owner, leaf, nn.Parameter(fed))


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
    for layer in group.layers(_complement(keep[group.name], group.units).tolist()):
        stack.enter_context(skipped([model.get_submodule(f"{axis.layers}.{layer}")]))
