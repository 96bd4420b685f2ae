"""What `slimlmm inspect` tells of a model: its parts and axes, what they cost, and what they would at other sizes.

All of it comes from the configuration; no weights are read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from slimlmm import checkpoint
from slimlmm.anatomy import describe
from slimlmm.axes import Anatomy, Axis
from slimlmm.costs import PICTURE, Answer, answer_use
from slimlmm.deployable import refuse_unsplittable, warnings_of
from slimlmm.errors import UserError
from slimlmm.parts import INSIDE, ORDER, Part, parts_of
from slimlmm.probing import skeleton
from slimlmm.resizing import resized, shapes_at

Shapes = Mapping[str, tuple[int, ...]]
#: parameters, bytes, and FLOPs of an answer (None: not known) of something
Amount = dict[str, Any]


def inspect(
    model: str,
    texts: Sequence[str] = (),
    *,
    tensor_parallel: int = 1,
    tokens: int = 8,
    picture: int = PICTURE,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Describe the parts and axes of a model, now and at other sizes, from its config alone; no weights are read.

    Bytes are those of the config's number format. FLOPs are of one answer (`costs.Answer.flops`): a prompt of one picture and
    eight words, and `tokens` generated tokens; null with the reason where no such prompt is known.
    """
    config = checkpoint.load_config(model, trust_remote_code=trust_remote_code)
    anatomy = describe(config)
    sizes = sizes_of(texts, anatomy)
    warnings = warnings_of(config, tensor_parallel)
    after = _after(config, sizes, tensor_parallel) if sizes else None
    answer = answer_use(config, tokens, picture)
    measured = _Measured(config, answer, lambda other: answer_use(other, tokens, picture))
    whole = measured.amount({})
    if after is not None:
        after |= measured.amount(sizes) | {"parts": measured.parts(sizes), "tree": measured.tree(sizes)}
    return {
        "model": model,
        "model_type": anatomy.model_type,
        "dtype": str(measured.dtype).removeprefix("torch."),
        **whole,
        "answer": {
            "tokens": tokens,
            "prompt": answer.prompt or None,
            "picture": answer.picture or None,
            "reason": answer.reason,
        },
        "parts": measured.parts({}),
        "tree": measured.tree({}),
        "axes": [_axis(axis, measured, whole) for axis in anatomy.axes.values()],
        "after": after,
        "tensor_parallel": tensor_parallel,
        "warnings": warnings,
    }


def sizes_of(texts: Iterable[str], anatomy: Anatomy, option: str = "--set") -> dict[str, int]:
    """Parse the ``axis=size`` words of an option; all problems at once."""
    sizes, problems = {}, []
    for text in texts:
        name, _, value = text.partition("=")
        if not (value.isascii() and value.isdigit()):
            problems.append(f"{text!r} is not axis=size (a whole number)")
            continue
        try:
            axis = anatomy.axis(name)
        except UserError as error:
            problems.append(str(error))
            continue
        if name in sizes:
            problems.append(f"{name} is given twice")
        if axis.kind == "vocab":
            problems.append(
                "vocab goes with the tokenizer and needs texts: put drop: [unused_tokens] into a recipe for compress"
            )
        elif not 0 < int(value) <= axis.size:
            problems.append(f"{text}: the axis has {axis.size}; give 1 to {axis.size}")
        sizes[name] = int(value)
    if problems:
        raise UserError(f"{option}:\n  " + "\n  ".join(problems))
    return sizes


def _after(config: Any, sizes: dict[str, int], tensor_parallel: int) -> dict[str, Any]:
    """Check that the stock config can say these sizes, and return them with what would hinder serving."""
    return {"sizes": sizes, "warnings": refuse_unsplittable(config, sizes, tensor_parallel)}


class _Measured:
    """One configuration with what its parameters cost; every method takes the sizes to tell it for."""

    def __init__(self, config: Any, answer: Answer, ask: Callable[[Any], Answer]) -> None:
        self.config, self.answer, self.ask = config, answer, ask
        self.others: dict[tuple[tuple[str, int], ...], Answer] = {}
        self.dtype: torch.dtype = dtype_of(config)
        self.weights = frozenset(skeleton(config).weights)
        self.part = parts_of(config)

    def shapes(self, sizes: Mapping[str, int]) -> Shapes:
        return shapes_at(self.config, sizes)

    def flops(self, sizes: Mapping[str, int]) -> dict[str, float] | None:
        """Return FLOPs by parameter; fewer query tokens are another prompt, which is asked anew."""
        axes = describe(self.config).axes
        prompt = tuple(sorted((name, size) for name, size in sizes.items() if axes[name].kind == "tokens"))
        if prompt and prompt not in self.others:
            self.others[prompt] = self.ask(resized(self.config, dict(prompt)))
        return (self.others[prompt] if prompt else self.answer).flops(self.shapes(sizes))

    def amount(self, sizes: Mapping[str, int]) -> Amount:
        """Return parameters, bytes and FLOPs of the whole model."""
        shapes, flops = self.shapes(sizes), self.flops(sizes)
        return self._amount(
            sum(math.prod(shapes[name]) for name in self.weights if name in shapes),
            None if flops is None else sum(flops.values()),
        )

    def _amount(self, parameters: int, flops: float | None) -> Amount:
        size = torch.empty(0, dtype=self.dtype).element_size()
        return {"parameters": parameters, "bytes": parameters * size, "flops": flops}

    def by_part(self, sizes: Mapping[str, int]) -> dict[Part, Amount]:
        """Return the amount of each part; a tied head has FLOPs and no parameters of its own."""
        shapes, flops = self.shapes(sizes), self.flops(sizes)
        counts: dict[Part, int] = {}
        spent: dict[Part, float] = {}
        for name, shape in shapes.items():
            part = self.part[name]
            counts[part] = counts.get(part, 0) + (math.prod(shape) if name in self.weights else 0)
            spent[part] = spent.get(part, 0.0) + (flops or {}).get(name, 0.0)
        return {part: self._amount(count, None if flops is None else spent[part]) for part, count in counts.items()}

    def parts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return parameters by part as `measure.parameters` tells them."""
        found: dict[str, int] = {}
        for (tower, inside), amount in self.by_part(sizes).items():
            name = "embeddings" if (tower, inside) == ("text", "embeddings") else tower
            found[name] = found.get(name, 0) + amount["parameters"]
        return {name: count for name, count in found.items() if count} | {"total": sum(found.values())}

    def tree(self, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return the towers in order, each with its parts."""
        found = self.by_part(sizes)
        tree = []
        for tower in ORDER:
            inside = {part[1]: amount for part, amount in found.items() if part[0] == tower}
            if not inside:
                continue
            known = all(amount["flops"] is not None for amount in inside.values())
            total = self._amount(
                sum(amount["parameters"] for amount in inside.values()),
                sum(amount["flops"] for amount in inside.values()) if known else None,
            )
            branches = [{"part": name, **inside[name]} for name in INSIDE if name in inside]
            tree.append({"part": tower, **total, "parts": branches})
        return tree


def dtype_of(config: Any) -> torch.dtype:
    """Return the number format that the configuration states, on top or for its text part; float32 where it states none."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and isinstance(part.dtype, torch.dtype):
            return part.dtype
    return torch.float32


def _axis(axis: Axis, measured: _Measured, whole: Amount) -> dict[str, Any]:
    choices = axis.choices() if not axis.refusal else ()
    smaller = [size for size in choices if size < axis.size]
    least = measured.amount({axis.name: smaller[0]}) if smaller else None
    step = measured.amount({axis.name: smaller[-1]}) if smaller else None
    return {
        "axis": axis.name,
        "size": axis.size,
        "allowed": _ranges(choices),
        "parameters_at_least": least["parameters"] if least else whole["parameters"] if choices else None,
        "share": 1 - least["parameters"] / whole["parameters"] if least else 0.0 if choices else None,
        "unit": _step(axis.size - smaller[-1], whole, step) if step else None,
        "exact": axis.exact,
        "note": axis.note,
        "refusal": axis.refusal,
    }


def _step(units: int, whole: Amount, less: Amount) -> dict[str, Any]:
    """Return what goes when an axis shrinks by its smallest step."""
    known = whole["flops"] is not None and less["flops"] is not None
    return {
        "size": units,
        "parameters": whole["parameters"] - less["parameters"],
        "flops": whole["flops"] - less["flops"] if known else None,
    }


def _ranges(choices: Sequence[int]) -> str:
    """Say legal sizes briefly: "9, 18 .. 576 by 9"."""
    if len(choices) <= 6:
        return ", ".join(map(str, choices)) or "-"
    step = choices[1] - choices[0]
    even = all(b - a == step for a, b in itertools.pairwise(choices))
    between = f" by {step}" if even and step > 1 else "" if even else f" ({len(choices)} sizes)"
    return f"{choices[0]} .. {choices[-1]}{between}"
