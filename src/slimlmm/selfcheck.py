"""Nothing is trusted that was not checked: prove on a shallow random copy that a configuration can be cut.

For every axis: cut == masked, the cut model has the predicted number of parameters, saves and reloads with no
key missing or left over, answers the same afterwards, and generates. No weights of the real model are needed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis, Keep
from slimlmm.errors import UserError
from slimlmm.families import backbone_of, family_of, stock_class
from slimlmm.prompts import Batch, picture_prompt
from slimlmm.resizing import block_kinds, predict_parameters, resized
from slimlmm.surgery import check, cut, masked, new_config
from slimlmm.token_ids import new_ids, referenced
from slimlmm.views import View

#: largest |cut - masked| of the logits, as a share of the largest logit
TOLERANCE = 1e-5
#: a difference up to here may be rounding that one random model blows up: a wrong cut is wrong in every one, so others are drawn
DOUBTFUL = 1e-3
#: random models drawn at most
DRAWS = 3
#: layers per tower of the shallow copy
DEPTH = 3
#: most tokens of the shallow copy; a full vocabulary would be most of it, and no axis but its own knows it
VOCABULARY = 2048
#: inputs that are tokens of the text tower
TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Verdict on one axis. `error`: largest |cut - masked| over the largest |logit|, None without one."""

    axis: str
    ok: bool
    error: float | None = None
    reason: str = ""


def self_check(config: Any, axes: Iterable[str] | None = None) -> list[Check]:
    """Check these axes of `config` (default: all not refused) on a random copy of few layers.

    One verdict per axis; what fails there is a reason, never an exception.
    """
    names = list(axes) if axes is not None else list(describe(config).sizes)
    copied = shallow(config)
    anatomy = describe(copied)
    model = random_model(copied)
    batch = picture_prompt(copied)
    return [_check(model, anatomy, name, batch) for name in names]


def shallow(config: Any, depth: int = DEPTH) -> Any:
    """Return `config` with about `depth` blocks per tower (whole periods, and one at least of every kind) and few tokens."""
    sizes, blocks = {}, {}
    for axis in describe(config).axes.values():
        if axis.kind != "blocks" or axis.refusal:
            continue
        group = replace(axis.groups[0], some_of=axis.groups[0].some_of + block_kinds(config, axis))
        more = axis.minimum > group.least * group.stride  # it must not fall below the depth of another axis
        count = min(group.units, max(depth // axis.multiple, 2, group.least) + more)
        sizes[axis.name], blocks[axis.name] = count * group.stride, group.first(count).tolist()
    return _fewer_tokens(resized(config, sizes, blocks))


def _fewer_tokens(config: Any) -> Any:
    """Return `config` with the tokens that it mentions and as many others as `VOCABULARY` leaves room for."""
    axis = describe(config).axes["vocab"]
    if axis.refusal or axis.size <= VOCABULARY:
        return config
    mentioned = referenced(*family_of(config).token_data(config.to_dict()).values())
    ids = sorted({token for token in mentioned if token < axis.size})
    plain = (token for token in range(axis.size) if token not in set(ids))
    kept = sorted([*ids, *itertools.islice(plain, max(VOCABULARY - len(ids), 16))])
    return new_config(config, axis, len(kept), {"vocab": torch.tensor(kept)})


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a random model of `config` in which all matters: unit gain in matrices, jitter in vectors.

    Queries are as long as trained ones, lest attention picks single tokens and blows up rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = stock_class(config).from_config(config, dtype=torch.float32)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
            for name, buffer in model.state_dict().items():
                if buffer.is_floating_point() and buffer.dim() and name not in parameters:
                    buffer.add_(torch.randn_like(buffer), alpha=0.2)
            _shorten_queries(model, parameters)
    model.train(False)
    return model


def _shorten_queries(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> None:
    family = family_of(model.config)
    for tower in family.towers:
        backbone = backbone_of(model.config, tower)
        if backbone is not None and backbone.query_norm:
            view = View(model.config, family, tower, backbone)
            for name, parameter in parameters.items():
                if view.inside(name)[1] == f"{backbone.query_norm}.weight":
                    parameter.mul_(len(parameter) ** -0.5)


def some_units(axis: Axis, size: int, seed: int = 0) -> Keep:
    """Return a random choice of units that brings `axis` to `size`."""
    rng = torch.Generator().manual_seed(seed)
    return {group.name: group.best(torch.rand(group.units, generator=rng), group.kept(size)) for group in axis.groups}


def _check(model: PreTrainedModel, anatomy: Anatomy, name: str, batch: Batch) -> Check:
    try:
        axis = anatomy.axis(name)
        smaller = [size for size in axis.choices() if size < axis.size]
        if not smaller:
            return Check(axis=name, ok=True, reason=f"{axis.size} is the smallest size that the config can say")
        size = smaller[(len(smaller) - 1) // 2]
        error = _prove(model, anatomy, axis, size, batch)
        for seed in range(1, DRAWS):
            if TOLERANCE < error <= DOUBTFUL:
                error = _prove(random_model(model.config, seed), anatomy, axis, size, batch)
    except UserError as refused:
        return Check(axis=name, ok=False, reason=str(refused))
    except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as broken:
        return Check(axis=name, ok=False, reason=f"{type(broken).__name__}: {broken}")
    if error > TOLERANCE:
        reason = f"the cut model differs from the masked one by {error:.1e} of the largest logit"
        return Check(axis=name, ok=False, error=error, reason=reason)
    return Check(axis=name, ok=True, error=error)


def _prove(model: PreTrainedModel, anatomy: Anatomy, axis: Axis, size: int, batch: Batch) -> float:
    """Return the relative difference of cut and masked logits; raise if anything else does not hold."""
    proof = compare(model, anatomy, axis, units_to_keep(model, axis, size, batch), batch)
    if not proof.moved:
        raise UserError("masking half of the units changes nothing, so nothing was proven")
    if proof.counted != proof.predicted:
        raise UserError(f"predicted {proof.predicted} parameters, counted {proof.counted}")
    inputs, logits, error = proof.inputs, proof.logits, proof.error
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_plain(proof.student, Path(folder))
        del proof  # two models at a time are enough
        _prove_folder(Path(folder), inputs, logits)
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A model cut along one axis, beside the one that was masked.

    `inputs` are what the cut model was given, `error` is the largest |cut - masked| of the logits over the largest |masked|,
    `predicted` and `counted` are parameters, `moved` tells whether the mask changed the logits at all.
    """

    student: PreTrainedModel
    inputs: Batch
    logits: Tensor
    error: float
    predicted: int
    counted: int
    moved: bool


@torch.no_grad()
def compare(
    model: PreTrainedModel, anatomy: Anatomy, axis: Axis, keep: Keep, batch: Batch, before: Tensor | None = None
) -> Proof:
    """Cut `model` and mask it by the same choice; `before` are its own logits, where they are known already."""
    student = cut(model, anatomy, axis.name, keep)
    inputs = dict(batch)
    if axis.kind == "vocab":
        new = new_ids(keep["vocab"].tolist(), axis.groups[0])
        inputs |= {key: batch[key].clone().apply_(new.__getitem__) for key in TOKENS if key in batch}
    if axis.kind == "tokens":
        batch = inputs = picture_prompt(student.config)
    with masked(model, anatomy, axis.name, keep):
        wanted = model(**batch).logits
    largest = float(wanted.abs().max())
    if axis.kind == "vocab":
        wanted, moved = wanted[..., keep["vocab"]], True
    elif axis.kind == "tokens":  # the prompt is another one
        moved = True
    else:
        before = model(**batch).logits if before is None else before
        moved = not torch.allclose(wanted, before, rtol=0, atol=1e-4 * largest)
    got = student(**inputs).logits
    blocks = {name: units.tolist() for name, units in keep.items()} if axis.kind == "blocks" else None
    return Proof(
        student=student,
        inputs=inputs,
        logits=got,
        error=_apart(got, wanted),
        predicted=predict_parameters(model.config, {axis.name: check(axis, keep)}, blocks),
        counted=sum(parameter.numel() for parameter in student.parameters()),
        moved=moved,
    )


def _apart(got: Tensor, wanted: Tensor) -> float:
    """Return max |got - wanted| over max |wanted|; 0 where both are 0 everywhere (LayerNorms of one channel)."""
    difference = float((got - wanted).abs().max())
    return difference / float(wanted.abs().max()) if difference else difference


def units_to_keep(model: PreTrainedModel, axis: Axis, size: int, batch: Batch, seed: int = 0) -> Keep:
    """Return a random choice of units; of the vocabulary every second token and all that anything mentions, whatever the size."""
    return _kept_tokens(model, axis, batch) if axis.kind == "vocab" else some_units(axis, size, seed)


@torch.no_grad()
def _prove_folder(folder: Path, inputs: Batch, logits: Tensor) -> None:
    """Load with the stock class, compare, generate."""
    again = checkpoint.verify(folder, "cpu")
    if not torch.allclose(again(**inputs).logits, logits, rtol=0, atol=1e-6 * float(logits.abs().max())):
        raise UserError("the model gives other logits after saving and loading")
    length = 1 if "decoder_input_ids" in inputs else inputs["input_ids"].shape[1]
    generate: Any = again.generate
    answer: Tensor = generate(
        **{key: value for key, value in inputs.items() if key != "decoder_input_ids"},
        max_new_tokens=2,
        min_new_tokens=1,
        do_sample=False,
    )
    if answer.shape[1] <= length:
        raise UserError("the cut model generates nothing")


def _kept_tokens(model: PreTrainedModel, axis: Axis, batch: Batch) -> Keep:
    """Keep every second token, and all that the prompt or a configuration mentions."""
    data = model.config.to_dict()
    mentioned = referenced(*family_of(model.config).token_data(data).values(), model.generation_config.to_dict())
    kept = {
        *range(0, axis.size, 2),
        *(token for tokens in axis.groups[0].some_of for token in tokens),
        *(token for key in TOKENS if key in batch for token in batch[key].flatten().tolist()),
        *mentioned,
    }
    return {"vocab": torch.tensor(sorted(token for token in kept if token < axis.size))}
