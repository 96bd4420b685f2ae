"""What an answer costs in floating-point operations, told from a configuration alone; no weights of the model are needed.

How often each weight is used is not guessed: a copy of few blocks and narrow sizes, all its weights zero, answers a prompt
of the same pictures and words while torch counts. Per weight, and per channel of attention, the count is that of the full model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from slimlmm.anatomy import describe
from slimlmm.axes import Axis
from slimlmm.errors import UserError
from slimlmm.families import backbone_of, family_of, stock_class
from slimlmm.probing import get, skeleton
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import block_kinds, resized
from slimlmm.views import View, view_of

#: side in pixels of the picture that a model of no fixed picture size is asked about
PICTURE = 448
#: most weights that the narrow copy may have
LARGEST = 400_000_000
#: sizes that the narrow copy does not go below, where a tower bears less badly
_NARROW = {"width": 32, "ffn": 8, "expert_ffn": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """FLOPs that one parameter stands for: per weight, per input channel (attention that its module computes), and constant.

    `experts`: how many it had; a token takes as many of fewer ones, so that their number does not count.
    """

    weight: float = 0.0
    channel: float = 0.0
    constant: float = 0.0
    experts: int = 0

    def flops(self, shape: tuple[int, ...]) -> float:
        """Return ``weight * numel + channel * inputs + constant``."""
        weights = math.prod((self.experts, *shape[1:])) if self.experts else math.prod(shape)
        return self.weight * weights + self.channel * (shape[1] if len(shape) > 1 else 0) + self.constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How an answer uses a model: one prompt of a picture, and `tokens` generated tokens.

    `uses`: by state-dict name of the narrow copy; `stands_for`: block prefix of the full model -> that of the copy.
    `reason` says why nothing could be counted; then `uses` is empty.
    """

    uses: Mapping[str, Use]
    blocks: Mapping[str, Mapping[int, int]]
    prompt: int = 0
    picture: str = ""
    tokens: int = 0
    reason: str = ""

    def flops(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float] | None:
        """Return FLOPs by parameter of a model of these shapes; None where nothing could be counted.

        Per answer: 2 x weights x positions that pass them (each patch in the vision tower, each picture token and word behind
        it, one position per generated token after the first; the head reads the last position alone; a token passes its chosen
        experts only), plus 4 x queries x keys x channels of attention. Looking an embedding up counts nothing.
        """
        if self.reason:
            return None
        return {
            name: self.uses[copied].flops(shape)
            for name, shape in shapes.items()
            if (copied := self._copied(name)) in self.uses
        }

    def _copied(self, name: str) -> str:
        for prefix, places in self.blocks.items():
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and number.isdigit():
                return f"{prefix}.{places.get(int(number), int(number))}.{rest}"
        return name


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of floating-point operations, taught what it lacks: CPU attention, products of grouped experts."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
            aten._grouped_mm: _grouped_flops,
        },
    )


def answer_use(config: Any, tokens: int = 8, picture: int = PICTURE) -> Answer:
    """Let a narrow copy of `config` answer a picture prompt with `tokens` tokens, and count what each weight is used for.

    `picture`: pixels per side where the model takes any size. A model whose copy cannot be made or run is answered with
    the reason, never with a guess.
    """
    try:
        small, blocks = narrow(config)
        batch = picture_prompt(config, pixels=picture)
        if (count := skeleton(small).parameters) > LARGEST:
            raise UserError(
                f"no small copy can be made: its sizes cannot be lowered, and it would have {count:,} weights"
            )
        model = _zero_model(small)
        with _one_thread():
            counted = _counted(model, batch, tokens)
    except (UserError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if not isinstance(error, UserError):
            reason = f"the copy failed at a picture of {picture} pixels a side ({type(error).__name__}: {reason})"
        return Answer(uses={}, blocks={}, reason=f"no answer could be counted: {reason}")
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items() if "pixel_values" in key)
    uses = _uses(small, model, counted)
    return Answer(uses=uses, blocks=blocks, prompt=batch["input_ids"].shape[1], picture=shown, tokens=tokens)


def narrow(config: Any) -> tuple[Any, dict[str, dict[int, int]]]:
    """Return `config` with small sizes and one block of each kind, and by list of blocks which block stands for which."""
    anatomy = describe(config)
    sizes: dict[str, int] = {}
    kept: dict[str, list[int]] = {}
    stands: dict[str, dict[int, int]] = {}
    for name, axis in anatomy.axes.items():
        if axis.refusal or axis.kind == "vocab":
            continue
        if axis.kind == "blocks":
            kept[name], stands[axis.layers] = _kinds(config, axis)
            sizes[name] = len(kept[name]) * axis.groups[0].stride
        elif axis.noun in _NARROW or name.startswith("projector."):
            sizes[name] = _least(config, axis)
    for name in [name for name in sizes if anatomy.axes[name].noun == "ffn"]:
        width = anatomy.axes.get(f"{name.partition('.')[0]}.width")
        if width is not None and anatomy.axes[name].multiple == width.size > 1:
            sizes[name] = sizes.get(width.name, width.size)
    return resized(config, sizes, kept), stands


def _least(config: Any, axis: Axis) -> int:
    """Return a small legal size; of a width one that its heads divide, which some config classes insist on."""
    least = min(_NARROW.get(axis.noun, 8), axis.size)
    sizes = [size for size in axis.choices() if size >= least]
    if axis.kind == "width":
        heads = view_of(config, axis.name.partition(".")[0]).heads
        sizes = [size for size in sizes if size % heads == 0] or sizes
    return min(sizes, default=axis.size)


def _kinds(config: Any, axis: Axis) -> tuple[list[int], dict[int, int]]:
    """Return the units that stay, one at least of each kind of block, and block -> its number in the copy."""
    view, group = view_of(config, axis.name.partition(".")[0]), axis.groups[0]
    sets = block_kinds(config, axis)
    shapes: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in skeleton(config).shapes.items():
        layer, inside = view.locate(name)
        if layer is not None:
            shapes.setdefault(layer, []).append((inside, shape))
    signs: dict[int, tuple[Any, ...]] = {}
    for unit in range(group.units):
        layers = group.layers([unit])
        signs[unit] = tuple((tuple(layer in found for found in sets), tuple(shapes[layer])) for layer in layers)
    first: dict[Any, int] = {}
    for unit in range(group.units):
        first.setdefault(signs[unit], unit)
    kept = set(first.values())
    for units in group.some_of:
        if not kept & set(units):
            kept.add(units[0])
    numbers = {unit: number for number, unit in enumerate(sorted(kept))}
    stands = {
        unit * group.stride + i: numbers[first[signs[unit]]] * group.stride + i
        for unit in range(group.units)
        for i in range(group.stride)
    }
    return sorted(kept), stands


def _zero_model(config: Any) -> Any:
    """Return a model whose weights are all zero; numpy's zeros take no memory until they are written, torch's do."""
    with no_init_weights():
        model: Any = stock_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                zeros = torch.from_numpy(np.zeros(tuple(parameter.shape), dtype=np.float32))
                setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    model.tie_weights()
    model.requires_grad_(False)
    return model.eval()


def _counted(model: Any, batch: Mapping[str, torch.Tensor], tokens: int) -> dict[str, float]:
    """Return FLOPs of one answer by module, each without what its children spent."""
    outputs, seen = model.get_output_embeddings(), [0]
    with _no_head(outputs, seen), torch.no_grad(), flop_counter() as counter, _by_module(model, counter) as spent:
        generate(model, batch, tokens)
    if isinstance(outputs, nn.Linear):
        head = next(name for name, module in model.named_modules() if module is outputs)
        spent[head] = 2.0 * outputs.weight.numel() * seen[0]
    return {name: flops for name, flops in spent.items() if flops > 0}


def generate(model: Any, batch: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Answer a picture prompt greedily, with a cache, by exactly `tokens` tokens."""
    inputs = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread: products this small wait for threads longer than they take (15x on busy cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _by_module(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, float]]:
    """Charge what `counter` counts to the innermost module that is running, by its name."""
    spent: dict[str, float] = {}
    running = [""]
    before = [0.0]

    def charge() -> None:
        total = float(counter.get_total_flops())
        spent[running[-1]] = spent.get(running[-1], 0.0) + total - before[0]
        before[0] = total

    def enter(name: str) -> None:
        charge()
        running.append(name)

    def leave() -> None:
        charge()
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(module.register_forward_hook(lambda *_: leave()))
    try:
        yield spent
    finally:
        charge()
        for handle in handles:
            handle.remove()


@contextmanager
def _no_head(outputs: nn.Module | None, seen: list[int]) -> Iterator[None]:
    """Let the head answer zeros without computing, and count the positions that it was asked for."""
    if not isinstance(outputs, nn.Linear):
        yield
        return

    def answer(states: torch.Tensor) -> torch.Tensor:
        seen[0] += states.numel() // states.shape[-1]
        return states.new_zeros(1).expand(*states.shape[:-1], outputs.out_features)

    vars(outputs)["forward"] = answer
    try:
        yield
    finally:
        del vars(outputs)["forward"]


def _uses(config: Any, model: Any, counted: Mapping[str, float]) -> dict[str, Use]:
    """Share the FLOPs of each module among its parameters, or among the inputs of the attention that it belongs to."""
    shapes = skeleton(config).shapes
    readers = _readers(config, shapes)
    matrices: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            matrices.setdefault(name.rpartition(".")[0], []).append(name)
    sums: dict[str, list[float]] = {}
    for module, flops in counted.items():
        if own := matrices.get(module, ()):
            whole = sum(math.prod(shapes[name]) for name in own)
            for name in own:
                sums.setdefault(name, [0.0, 0.0, 0.0])[0] += flops / whole
        elif reader := readers.get(module):
            sums.setdefault(reader, [0.0, 0.0, 0.0])[1] += flops / shapes[reader][1]
        else:
            sums.setdefault(_anchor(module, shapes), [0.0, 0.0, 0.0])[2] += flops
    chosen, experts = _chosen(config), _experts(config, shapes)
    return {
        name: Use(weight=w * chosen.get(name, 1.0), channel=channel, constant=constant, experts=experts.get(name, 0))
        for name, (w, channel, constant) in sums.items()
    }


def _experts(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of experts of every parameter that holds a matrix for each."""
    axes = (axis for axis in describe(config).axes.values() if axis.kind == "experts")
    slots = (slot for axis in axes for group in axis.groups for slot in group.slots)
    return {slot.parameter: shapes[slot.parameter][0] for slot in slots if len(shapes[slot.parameter]) > 2}


def _readers(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return every module of an attention (itself and what is in it) -> the weight that reads the heads' outputs."""
    found: dict[str, str] = {}
    family = family_of(config)
    for tower in family.towers:
        backbone = backbone_of(config, tower)
        if backbone is None:
            continue
        view = View(config, family, tower, backbone)
        for name in shapes:
            inside = view.inside(name)[1]
            for attention in backbone.attention:
                for consumer in attention.consume:
                    if name.startswith(f"{tower.prefix}.") and inside == f"{attention.module}.{consumer}.weight":
                        found[name.removesuffix(f".{consumer}.weight")] = name
    inner: dict[str, str] = {}
    for module, reader in found.items():
        for name in shapes:
            if name.startswith(f"{module}."):
                for end in range(len(module), len(name)):
                    if name[end] == ".":
                        inner.setdefault(name[:end], reader)
    return inner | found


def _anchor(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first parameter in `module`, or in the nearest module around it that has one."""
    while module:
        for name in shapes:
            if name.startswith(f"{module}."):
                return name
        module = module.rpartition(".")[0]
    return next(iter(shapes))


def _chosen(config: Any) -> dict[str, float]:
    """Return the share of each expert weight that a token passes, where the stock modelling runs all experts on every token."""
    found: dict[str, float] = {}
    family = family_of(config)
    for tower in family.towers:
        backbone = backbone_of(config, tower)
        if backbone is None or not backbone.runs_all_experts:
            continue
        used, there = (
            int(get(config, (tower.config, name))) for name in (backbone.experts_per_token, backbone.experts)
        )
        axis = describe(config).axes.get(f"{tower.name}.expert_ffn")
        for slot in (slot for group in (axis.groups if axis else ()) for slot in group.slots):
            if len(skeleton(config).shapes[slot.parameter]) > 2:
                found[slot.parameter] = used / there
    return found


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return 2 B N S T (D + E): scores, then weighted sum.

    Shapes: query [B, N, S, D], key [B, N, T, D], value [B, N, T, E].
    """
    b, heads, s, d = query
    return int(2 * b * heads * s * key[-2] * (d + value[-1]))


def _grouped_flops(one: Any, other: Any, *args: Any, **kwargs: Any) -> int:
    """Return 2 M K N, for each of E experts where both have them ([E, M, K] x [E, K, N]); else M, K or N is shared out."""
    experts = one[0] if len(one) == len(other) == 3 else 1
    return int(2 * experts * one[-2] * one[-1] * other[-1])


def _attention_backward_flops(_gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return 2.5 times the forward pass: scores again, and two products for each of the two forward ones."""
    return _attention_flops(query, key, value) * 5 // 2
