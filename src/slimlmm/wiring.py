"""Which norm feeds which reader of a residual stream, found by following a forward pass through its graph.

Shapes tell who owns a channel, not who reads it through which norm; to rotate the stream one must know both.
Nothing here looks at class names: norms are told apart by what they compute, links by what the graph says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlmm.axes import Group, Slot
from slimlmm.collate import Batch
from slimlmm.forward import evaluating, forward
from slimlmm.norms import NormKind, classify

#: autograd nodes that only move numbers around
MOVES: tuple[str, ...] = (
    "View",
    "Reshape",
    "Transpose",
    "Permute",
    "Slice",
    "Select",
    "Squeeze",
    "Unsqueeze",
    "Clone",
    "Copy",
    "Index",
)
MOVES += ("Expand", "Alias", "TBackward", "Split", "Unbind", "Narrow", "Flatten", "Gather")
PRODUCTS = ("mm", "Linear", "Convolution", "Matmul")


class NotRotatable(Exception):  # noqa: N818
    """Why the basis of this residual stream cannot be changed; the caller falls back and tells."""


@dataclass(slots=True, kw_only=True)
class Wiring:
    """The residual stream of one group: `readers` by norm, `raw` readers, scales by producer, the tied head.

    `kinds` gives every live norm and scale by module name. `entry` is a norm that opens the stream (CLIP's
    first one) and `before_entry` the parameters that feed it. `final` is the norm in front of a head that
    shares its matrix with the embedding `tied`. `dead` parameters never reach the logits.
    """

    kinds: dict[str, NormKind] = field(default_factory=dict)
    readers: dict[str, list[Slot]] = field(default_factory=dict)
    raw: list[Slot] = field(default_factory=list)
    scaled: dict[str, str] = field(default_factory=dict)
    entry: str = ""
    before_entry: set[str] = field(default_factory=set)
    tied: str = ""
    final: str = ""
    dead: set[str] = field(default_factory=set)


def owner(parameter: str) -> str:
    """Return the name of the module that holds the parameter."""
    return parameter.rpartition(".")[0]


def trace(model: PreTrainedModel, group: Group, batch: Batch) -> Wiring:
    """Return the wiring of the residual stream `group` from one forward pass, or raise NotRotatable."""
    with evaluating(model), _all_gradients(model), torch.enable_grad(), _Recorder(model, group) as record:
        logits = forward(model, batch).logits
        graph = _Graph(logits.grad_fn)
        del logits
        wiring = _link(model, group, record, graph)
    for name, kind in wiring.kinds.items():
        if kind != "scale" and name != wiring.entry and name not in wiring.readers and name != wiring.final:
            raise NotRotatable(f"{name} writes into the residual stream, so its weight cannot be folded into a reader")
    kinds = {kind for kind in wiring.kinds.values() if kind != "scale"}
    if len(kinds) > 1:
        raise NotRotatable(f"the stream is read through norms of several kinds: {', '.join(sorted(kinds))}")
    return wiring


def norm_of(module: nn.Module, size: int) -> NormKind:
    """Return the kind of a norm over the whole stream, or raise NotRotatable."""
    weight = next(p for name, p in module.named_parameters(recurse=False) if name != "bias")
    if weight.shape != (size,):
        raise NotRotatable(f"a norm of {tuple(weight.shape)} values over a stream of {size} channels")
    kind = classify(module)
    if kind is None:
        raise NotRotatable(f"{type(module).__name__} is neither a LayerNorm, an RMSNorm nor a scale")
    return kind


class _Recorder:
    """Context manager that notes the autograd nodes at every module that holds a slot of the group."""

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        self.modules = dict(model.named_modules())
        self.names = {owner(slot.parameter) for slot in group.slots}
        head = model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), "")
        self.into: dict[str, Any] = {}
        self.out: dict[str, Any] = {}

    def __enter__(self) -> _Recorder:
        self.stack = ExitStack()
        for name in self.names | ({self.head} if self.head else set()):
            self.stack.callback(self.modules[name].register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.into.clear()
        self.out.clear()

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                self.into.setdefault(name, inputs[0].grad_fn)
            if isinstance(output, Tensor):
                self.out.setdefault(name, output.grad_fn)

        return hook


class _Graph:
    """All autograd nodes behind the logits: who uses whose output, and which parameters reach the logits."""

    def __init__(self, root: Any) -> None:
        self.users: dict[Any, list[Any]] = {}
        self.live: set[int] = set()
        stack, seen = [root], {root}
        while stack:
            node = stack.pop()
            if hasattr(node, "variable"):
                self.live.add(id(node.variable))
            for before, _ in node.next_functions:
                if before is None:
                    continue
                self.users.setdefault(before, []).append(node)
                if before not in seen:
                    seen.add(before)
                    stack.append(before)

    def source(self, node: Any, known: dict[Any, str]) -> str:
        """Follow `node` backwards through moves to a known node and return its name, or ""."""
        while node is not None and node not in known and _is(node, MOVES) and node.next_functions:
            node = node.next_functions[0][0]
        return known.get(node, "") if node is not None else ""

    def ends(self, node: Any) -> Iterator[Any]:
        """Yield the nodes that compute with the output of `node`, looking through moves."""
        for user in self.users.get(node, ()):
            if _is(user, MOVES):
                yield from self.ends(user)
            else:
                yield user

    def behind(self, node: Any) -> set[int]:
        """Return the ids of the parameters that `node` depends on."""
        found: set[int] = set()
        stack, seen = [node], {node}
        while stack:
            here = stack.pop()
            if hasattr(here, "variable"):
                found.add(id(here.variable))
            fresh = {before for before, _ in here.next_functions if before is not None} - seen
            seen |= fresh
            stack += fresh
        return found


def _is(node: Any, kinds: Iterable[str]) -> bool:
    name: str = node.name()
    return any(kind.lower() in name.lower() for kind in kinds)


def _link(model: PreTrainedModel, group: Group, record: _Recorder, graph: _Graph) -> Wiring:
    """Fill in the wiring from the recorded nodes."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if fixed := [slot.parameter for slot in group.slots if slot.parameter not in named]:
        raise NotRotatable(f"{fixed[0]} is a constant of the stream's channels")
    wiring = Wiring(dead={s.parameter for s in group.slots if id(named[s.parameter]) not in graph.live})
    slots = [slot for slot in group.slots if slot.parameter not in wiring.dead]
    for slot in slots:
        name = owner(slot.parameter)
        if slot.role == "affine" and name not in wiring.kinds:
            if name not in record.out:
                raise NotRotatable(f"{slot.parameter} is a scale outside of a module of its own")
            wiring.kinds[name] = norm_of(record.modules[name], group.units)
    norms = {record.out[name]: name for name, kind in wiring.kinds.items() if kind != "scale"}
    produced = {record.out[owner(s.parameter)]: owner(s.parameter) for s in slots if owner(s.parameter) in record.out}
    for name, kind in wiring.kinds.items():
        if kind == "scale":
            source = graph.source(record.into[name], {n: m for n, m in produced.items() if m not in wiring.kinds})
            if not source:
                raise NotRotatable(f"{name} scales something that is not the output of a linear layer")
            wiring.scaled[source] = name
    _link_readers(model, slots, record, graph, norms, wiring)
    _check_norms(named, slots, record, graph, wiring)
    return wiring


def _link_readers(
    model: PreTrainedModel,
    slots: list[Slot],
    record: _Recorder,
    graph: _Graph,
    norms: dict[Any, str],
    wiring: Wiring,
) -> None:
    """Link every consumer, and a head tied to the embedding, to the norm in front of it."""
    named = dict(model.named_parameters(remove_duplicate=False))
    head = named.get(f"{record.head}.weight")
    embedding = next((s for s in slots if s.role == "produce" and named[s.parameter] is head), None)
    for slot in slots:
        if slot.role != "consume" or (embedding is not None and named[slot.parameter] is head):
            continue
        name = owner(slot.parameter)
        if not isinstance(record.modules[name], nn.Linear):
            raise NotRotatable(f"{slot.parameter} reads the stream, but not as a linear layer")
        if name not in record.into:
            raise NotRotatable(f"{name} reads the stream in a way that one forward pass does not show")
        norm = graph.source(record.into[name], norms)
        if norm:
            wiring.readers.setdefault(norm, []).append(slot)
        else:
            wiring.raw.append(slot)
    if embedding is not None:
        wiring.tied, wiring.final = embedding.parameter, graph.source(record.into[record.head], norms)
        if not wiring.final:
            raise NotRotatable("the tied head does not read through a norm")
        wiring.readers.setdefault(wiring.final, [])


def _check_norms(
    named: dict[str, nn.Parameter], slots: list[Slot], record: _Recorder, graph: _Graph, wiring: Wiring
) -> None:
    """Refuse norms whose output goes elsewhere than to linear readers; find the one that opens the stream."""
    for name in [n for n, kind in wiring.kinds.items() if kind != "scale"]:
        node = record.out[name]
        if all(_is(end, PRODUCTS) for end in graph.ends(node)):
            continue
        behind = graph.behind(record.into[name])
        upstream = {s.parameter for s in slots if id(named[s.parameter]) in behind}
        others = {owner(p) for p in upstream} & set(wiring.kinds)
        if wiring.entry or name in wiring.readers or others - {name}:
            raise NotRotatable(f"the output of {name} is itself the residual stream")
        wiring.entry = name
        wiring.before_entry = {p for p in upstream if owner(p) != name}


@contextmanager
def _all_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Within the block all parameters require gradients, so that the graph reaches them."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
