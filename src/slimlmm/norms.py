"""Tell norms apart by what they compute, never by their class name."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

#: LayerNorm; RMSNorm with weight w; RMSNorm with weight 1 + w (Gemma); a plain scale
NormKind = Literal["layer", "rms", "rms1", "scale"]
_KINDS: dict[type[nn.Module], NormKind | None] = {}


def classify(module: nn.Module) -> NormKind | None:
    """Return the kind of a norm of n channels (n: length of its weight), None if it is none of them."""
    scales = [p.detach() for name, p in module.named_parameters(recurse=False) if name != "bias"]
    if not scales or scales[0].dim() != 1:
        return None
    weight: Tensor = scales[0]
    offset = getattr(module, "bias", None)
    offset = offset.detach() if isinstance(offset, Tensor) else torch.zeros_like(weight)
    rng = torch.Generator().manual_seed(0)
    values = (torch.randn(4, len(weight), generator=rng) + 0.5).to(weight)
    try:
        with torch.no_grad():
            found = module(values)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
        return None  # no module of one input and one output of its shape
    if not isinstance(found, Tensor) or found.shape != values.shape:
        return None
    found, values, weight, offset = found.float(), values.float(), weight.float(), offset.float()
    unit = values / values.square().mean(-1, keepdim=True).sqrt()
    centred = values - values.mean(-1, keepdim=True)
    centred = centred / centred.square().mean(-1, keepdim=True).sqrt()
    expected: dict[NormKind, Tensor] = {
        "layer": centred * weight + offset,
        "rms": unit * weight + offset,
        "rms1": unit * (1 + weight) + offset,
        "scale": values * weight + offset,
    }
    errors = {kind: float((found - value).norm() / found.norm()) for kind, value in expected.items()}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= 0.02 else None


def kind_of(module: nn.Module) -> NormKind | None:
    """Return the kind of a norm without weights (on the meta device), tried once per class on random weights."""
    # one class may norm a stream and, with a weight per head, queries: the latter says nothing of the class
    if next(module.children(), None) is not None or any(weight.dim() > 1 for weight in module.parameters()):
        return None
    if type(module) not in _KINDS:
        tried = copy.deepcopy(module).to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for parameter in tried.parameters():
                nn.init.normal_(parameter)
        _KINDS[type(module)] = classify(tried)
    return _KINDS[type(module)]
