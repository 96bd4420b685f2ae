"""What has to hold of every axis of every configuration; `check` of one axis says what it found, and never raises.

Shared by the tests (a fresh sample), by ``make conformance`` (all families) and by ``benchmarks/properties.py`` (a thousand
random configurations). Nothing here names an axis or a family: what ``describe`` finds is what is checked.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.errors import UserError
from slimlmm.prompts import picture_prompt
from slimlmm.selfcheck import TOKENS, TOLERANCE, compare, random_model, some_units, units_to_keep
from slimlmm.surgery import cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One axis of one configuration.

    `verdict`: proven; vacuous (the mask changed nothing); rounding (beyond the tolerance in single
    precision, and right to 1e-10 in double); refused; whole (no smaller size); broken.
    """

    axis: str
    verdict: str
    reason: str = ""
    error: float | None = None


class NoModelError(Exception):
    """The stock class itself does not build or run this configuration, so that there is nothing to say about it."""


@torch.no_grad()
def outcomes(config: Any, seed: int = 0) -> Iterator[Outcome]:
    """Yield what was found on every axis of `config`, cut to a random legal size by a random choice."""
    batch = picture_prompt(config)
    try:
        model = random_model(config, seed)
        before = model(**batch).logits
    except Exception as error:
        raise NoModelError(f"{type(error).__name__}: {error}") from error
    try:
        anatomy = describe(model.config)
    except Exception:
        yield Outcome(axis="describe", verdict="broken", reason=traceback.format_exc(limit=-4))
        return
    rng = random.Random(seed)
    for axis in anatomy.axes.values():
        yield outcome(model, anatomy, axis, batch, before, rng)
    if not torch.equal(model(**batch).logits, before):
        yield Outcome(axis="all", verdict="broken", reason="the input model was touched")


@torch.no_grad()
def outcome(model: Any, anatomy: Anatomy, axis: Axis, batch: Any, before: torch.Tensor, rng: random.Random) -> Outcome:
    """Return what was found on one axis: cut == masked, predicted == counted, or a refusal with its reason."""
    if axis.refusal:
        return Outcome(axis=axis.name, verdict="refused", reason=axis.refusal)
    smaller = [size for size in axis.choices() if size < axis.size]
    if not smaller:
        return Outcome(axis=axis.name, verdict="whole", reason="no smaller size can be said")
    size, seed = rng.choice(smaller), rng.randrange(1000)
    try:
        keep = units_to_keep(model, axis, size, batch, seed)
        proof = compare(model, anatomy, axis, keep, batch, before)
        exact = proof.error <= TOLERANCE
        rounding = not exact and exact_in_double(model, anatomy, axis, keep, batch, proof.error)
    except UserError as refused:
        return Outcome(axis=axis.name, verdict="refused", reason=f"{size} of {axis.size}: {refused}")
    except Exception:
        return Outcome(
            axis=axis.name, verdict="broken", reason=f"{size} of {axis.size}: {traceback.format_exc(limit=-4)}"
        )
    if proof.predicted != proof.counted:
        reason = f"{size} of {axis.size}: predicted {proof.predicted} parameters, counted {proof.counted}"
        return Outcome(axis=axis.name, verdict="broken", reason=reason, error=proof.error)
    if rounding:
        return Outcome(axis=axis.name, verdict="rounding", error=proof.error)
    if not exact:
        reason = f"{size} of {axis.size}: the cut model differs from the masked one by {proof.error:.1e}"
        return Outcome(axis=axis.name, verdict="broken", reason=reason, error=proof.error)
    return Outcome(axis=axis.name, verdict="proven" if proof.moved else "vacuous", error=proof.error)


def exact_in_double(model: Any, anatomy: Anatomy, axis: Axis, keep: Keep, batch: Any, error: float) -> bool:
    """Tell whether cut and masked model agree in double precision (`double`).

    Some random models (a LayerNorm over two channels, a residual stream of four) turn the last digit of a weight into more than
    the tolerance; in double precision they show that the cut is right to 1e-13, and a wrong one would show as well. Gemma's
    root of the width stays in single precision, so that there a tenth of `error`, that in single precision, is asked for: the
    error of a wrong cut would not shrink.
    """
    with double(batch) as wide:
        return compare(copy.deepcopy(model).double(), anatomy, axis, keep, wide).error <= max(1e-10, error / 10)


def same_in_double(one: Any, other: Any, batch: Any) -> bool:
    """Tell whether two models answer alike in double precision (`double`), a tenth of the tolerance allowed.

    The state of a gated delta rule stays in single precision whatever the model's is.
    """
    with double(batch) as wide:
        answers = [copy.deepcopy(model).double()(**wide).logits for model in (one, other)]
    return apart(*answers) <= TOLERANCE / 10


@contextlib.contextmanager
def double(batch: Any) -> Iterator[Any]:
    """Within the block stock classes stay in double precision, which they else leave in every norm; yields the batch in it."""
    to, softmax, grouped_mm = torch.Tensor.to, torch.nn.functional.softmax, torch.nn.functional.grouped_mm

    def stay(self: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        single = torch.float32 in args or settings.get("dtype") == torch.float32
        return to(self, torch.float64) if single else to(self, *args, **settings)

    def spread(values: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        if values.dtype == torch.float64:
            settings.pop("dtype", None)
        return softmax(values, *args, **settings)

    def by_expert(rows: torch.Tensor, experts: torch.Tensor, *, offs: torch.Tensor, **settings: Any) -> torch.Tensor:
        if rows.dtype != torch.float64:  # which the kernel does not know
            return grouped_mm(rows, experts, offs=offs, **settings)
        ends = offs.tolist()
        return torch.cat([rows[a:b] @ one for a, b, one in zip([0, *ends], ends, experts, strict=False)])

    with (
        mock.patch.object(torch.Tensor, "to", stay),
        mock.patch.object(torch.Tensor, "float", lambda self: stay(self, torch.float32)),
        mock.patch.object(torch.nn.functional, "softmax", spread),
        mock.patch.object(torch.nn.functional, "grouped_mm", by_expert),
    ):
        yield {key: to(value, torch.float64) if value.is_floating_point() else value for key, value in batch.items()}


def kind_of(reason: str) -> str:
    """Return a reason without its numbers, so that the same one is counted once."""
    return re.sub(r"\d+(\.\d+)?(, )?", "N", reason.partition(": ")[2] if re.match(r"\d+ of", reason) else reason)


#: units that stand in an order of their own, so that another order is another function
ORDERED = frozenset({"blocks", "vocab", "head_dim", "query_tokens", "decoder_blocks"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A random model of one configuration, with all that the laws ask of it."""

    model: Any
    anatomy: Anatomy
    batch: Any
    before: torch.Tensor

    def axes(self) -> list[Axis]:
        """Return the axes that can be cut to less."""
        return [axis for axis in self.anatomy.axes.values() if not axis.refusal and smaller(axis)]


@torch.no_grad()
def ready(config: Any) -> Ready:
    """Build a random model of `config` and its logits."""
    model, batch = random_model(config), picture_prompt(config)
    return Ready(model=model, anatomy=describe(model.config), batch=batch, before=model(**batch).logits)


def smaller(axis: Axis) -> list[int]:
    """Return the legal sizes below the present one."""
    return [size for size in axis.choices() if size < axis.size]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return max |one - other| over max |one|."""
    return float((one - other).abs().max() / one.abs().max())


def everything(axis: Axis) -> dict[str, torch.Tensor]:
    """Return the choice that keeps all units."""
    return {group.name: torch.arange(group.units) for group in axis.groups}


@torch.no_grad()
def keep_all_is_the_identity(found: Ready, axis: Axis) -> str:
    """Return "" where a cut that keeps all gives the same logits to the bit and shares no storage, else what is wrong."""
    same = cut(found.model, found.anatomy, axis.name, everything(axis))
    if {p.data_ptr() for p in found.model.parameters()} & {p.data_ptr() for p in same.parameters()}:
        return "the copy shares storage with its source"
    error = apart(found.before, same(**found.batch).logits)
    return f"keep-all changes the logits by {error:.1e}" if error else ""


@torch.no_grad()
def permuting_permutes_the_choice(found: Ready, axis: Axis, seed: int = 0) -> str:
    """Return "" where units in another order are the same function, and the same units cut from it are the same model.

    This needs no mask: it holds only if every place where the units live is known, in the right order.
    """
    if axis.noun in ORDERED:
        return ""
    size = smaller(axis)[len(smaller(axis)) // 2]
    keep = some_units(axis, size, seed)
    shuffled = cut(found.model, found.anatomy, axis.name, everything(axis))
    rng, moved, state = torch.Generator().manual_seed(seed), {}, shuffled.state_dict()  # buffers have units too
    for group in axis.groups:
        order = torch.randperm(group.units, generator=rng)
        moved[group.name] = torch.isin(order, keep[group.name]).nonzero().flatten()
        for slot in group.slots:
            parameter = state[slot.parameter]
            parameter.index_copy_(
                slot.dim,
                slot.rows(torch.arange(group.units), group.units),
                parameter.index_select(slot.dim, slot.rows(order, group.units)),
            )
    error = apart(found.before, shuffled(**found.batch).logits)
    if error > TOLERANCE and not same_in_double(found.model, shuffled, found.batch):
        return f"units in another order are another function: {error:.1e}"
    one = cut(found.model, found.anatomy, axis.name, keep)(**found.batch).logits
    other = cut(shuffled, found.anatomy, axis.name, moved)(**found.batch).logits
    error = apart(one, other)
    if error <= TOLERANCE or exact_in_double(found.model, found.anatomy, axis, keep, found.batch, error):
        return ""
    return f"the same units cut from another order differ by {error:.1e}"


@torch.no_grad()
def cuts_commute(found: Ready, first: Axis, second: Axis) -> str | None:
    """Return "" where two cuts give the same model in both orders, None where one makes the other another, else what is wrong."""
    keeps = {axis.name: _middle(found, axis) for axis in (first, second)}
    outputs = []
    try:
        for order in ((first, second), (second, first)):
            once = cut(found.model, found.anatomy, order[0].name, keeps[order[0].name])
            now = describe(once.config)
            keep = _carried(keeps, order, now)
            if keep is None:
                return None
            twice = cut(once, now, order[1].name, keep)
            outputs.append(twice(**_inputs(found, keeps, twice.config)).logits)
    except UserError:  # after one cut the config class refuses the other's size: heads that must divide a width
        return None
    error = apart(*outputs)
    return f"the order of the cuts makes a difference of {error:.1e}" if error > TOLERANCE else ""


def _middle(found: Ready, axis: Axis) -> dict[str, torch.Tensor]:
    sizes = smaller(axis)
    return dict(units_to_keep(found.model, axis, sizes[len(sizes) // 2], found.batch))


def _inputs(found: Ready, keeps: dict[str, dict[str, torch.Tensor]], config: Any) -> dict[str, torch.Tensor]:
    """Return the prompt: one of the cut model's own where query tokens went, renumbered where the vocabulary was cut."""
    if any(name.endswith(".query_tokens") for name in keeps):
        return dict(picture_prompt(config))
    inputs = dict(found.batch)
    for kept in (keep["vocab"] for name, keep in keeps.items() if name == "vocab"):
        inputs |= {key: torch.searchsorted(kept, inputs[key]) for key in TOKENS if key in inputs}
    return inputs


def _carried(
    keeps: dict[str, dict[str, torch.Tensor]], order: tuple[Axis, Axis], now: Anatomy
) -> dict[str, torch.Tensor] | None:
    """Return the choice of the second axis after the first was cut, None where its groups are other ones now."""
    first, second = order
    carried = {}
    for group in now.axes[second.name].groups:
        name = _name_before(group.name, first, second, keeps[first.name])
        old = next((other for other in second.groups if other.name == name), None)
        if old is None or (old.units, old.stride, old.rate) != (group.units, group.stride, group.rate):
            return None
        carried[group.name] = keeps[second.name][name]
    return carried or None


def _name_before(name: str, first: Axis, second: Axis, keep: Keep) -> str:
    """Return the name that a group of `second` had before `first` was cut: blocks and key/value heads are numbered anew."""
    if first.name.partition(".")[0] != second.name.partition(".")[0]:
        return name
    if first.kind == "blocks":
        (group,) = first.groups
        kept = [int(unit) * group.stride + i for unit in keep[group.name] for i in range(group.stride)]
        own = first.layers.rpartition(".")[0].rpartition(".")[2] + "." if first.noun == "decoder_blocks" else ""
        label = rf"^([^\[]*)\[{re.escape(own)}(\d+)\]"
        return re.sub(label, lambda found: f"{found[1]}[{own}{kept[int(found[2])]}]", name)
    stem, head = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", name).groups()
    if first.noun != "kv_groups" or second.noun not in ("queries", "head_dim") or head is None:
        return name
    places = {
        (slot.parameter, slot.dim) for one in second.groups if one.name.startswith(f"{stem}[") for slot in one.slots
    }
    heads = next(one for one in first.groups if places & {(slot.parameter, slot.dim) for slot in one.slots})
    return f"{stem}[{int(keep[heads.name][int(head)])}]"
