"""What a training changes and how fast: parameters by part of the model, the optimizer with its rates, frozen parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from slimlmm.axes import Anatomy
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.half import trains_in_half
from slimlmm.lessons import Readouts
from slimlmm.muon import Muon
from slimlmm.parts import parts_of
from slimlmm.spans import Span, schedule
from slimlmm.trainings import Training

ADAMW: dict[str, Any] = {"betas": (0.9, 0.98), "fused": True}


def parts_in(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    """Return the parts that recipes name, by parameter: vision, text or projector; of vision also what reads the pixels.

    The head is the text's; a Q-Former and what lies in no tower (separators of pictures, query tokens) join the two. Pixels are
    read by the first convolution of the vision tower, unless the family says what else reads them.
    """
    towers = {"vision": "vision", "text": "text", "head": "text"}
    found = {name: towers.get(tower, "projector") for name, (tower, _) in parts_of(model.config).items()}
    patches = family_of(model.config).patches or next(
        (
            name
            for name, one in model.named_modules()
            if isinstance(one, nn.Conv2d | nn.Conv3d) and found.get(f"{name}.weight") == "vision"
        ),
        None,
    )
    reads = {name for name in found if name.rpartition(".")[0] == patches}
    return {name: frozenset({part, "patch_embedding"} if name in reads else {part}) for name, part in found.items()}


class frozen:  # noqa: N801 - a context manager, used like a function
    """Within the block the named parts take no gradient: ``vision``, ``text``, ``projector``, ``patch_embedding``."""

    def __init__(self, model: PreTrainedModel, names: Collection[str]) -> None:
        parts = parts_in(model)
        self.parameters = [parameter for name, parameter in model.named_parameters() if parts[name] & set(names)]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)


@contextmanager
def settled_statistics(model: PreTrainedModel) -> Iterator[None]:
    """Within the block norms over batches (FastVLM's tower) use and keep the statistics they have, whatever the model's mode.

    Those of a step's few pictures are not what the teacher answered with, and are moved where a tower is frozen, too: a model
    distilled from itself began at .1 nats a token. torchvision's FrozenBatchNorm2d does the same.
    """

    def settle(norm: nn.Module, _inputs: Any) -> None:
        norm.eval()  # here, because the Trainer puts the whole model in training mode at every step

    hooks = [part.register_forward_pre_hook(settle) for part in model.modules() if isinstance(part, _BatchNorm)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def optimizers(
    model: PreTrainedModel, anatomy: Anatomy, settings: Training, readouts: Readouts, span: Span | None
) -> tuple[torch.optim.Optimizer, LambdaLR | None]:
    """Return the optimizer, and the schedule of a span; the Trainer makes that of a whole training."""
    optimizer = _optimizer(model, anatomy, settings, readouts)
    return optimizer, None if span is None else schedule(optimizer, settings, span.first)


def _optimizer(
    model: PreTrainedModel, anatomy: Anatomy, settings: Training, readouts: Readouts
) -> torch.optim.Optimizer:
    """No decay on vectors, and a learning rate that falls by ``layer_decay`` per vision block towards the picture."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    inner, parts = _inner(model) if settings.optimizer == "muon" else set(), parts_in(model)
    for name, parameter in model.named_parameters():
        here = parts[name]
        if here & settings.still:
            continue
        scale = _rate_scale(name, anatomy, settings) if "vision" in here else 1.0
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        by_muon = parameter in inner and "patch_embedding" not in here
        groups.setdefault((scale, decay, by_muon), []).append(parameter)
    if readouts.maps:
        groups.setdefault((1.0, 0.0, False), []).extend(readouts.parameters())
    if not groups:
        raise UserError(f"train.freeze: {', '.join(settings.freeze)} leaves nothing to train; freeze less.")
    matrices, others = (
        [
            {"params": parameters, "lr": settings.learning_rate * scale, "weight_decay": decay}
            for (scale, decay, moved), parameters in groups.items()
            if moved is by_muon
        ]
        for by_muon in (True, False)
    )
    if settings.optimizer == "muon":
        dtype = torch.bfloat16 if trains_in_half(settings.precision, model.device) else torch.float32
        optimizer: torch.optim.Optimizer = Muon(matrices, others, dtype, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(others, **ADAMW)
    _own(optimizer, readouts)
    return optimizer


def _inner(model: PreTrainedModel) -> set[Tensor]:
    """Return the matrices of linear maps between hidden states: neither embeddings nor what is tied to them, nor the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {parameter for end in ends if end is not None for parameter in end.parameters()}
    return {part.weight for part in model.modules() if isinstance(part, nn.Linear)} - outer


def _own(optimizer: torch.optim.Optimizer, readouts: Readouts) -> None:
    """Share out and clear the readouts' gradients at every step: the Trainer does so for its model, and that has no readout."""

    def share(*_: Any) -> None:
        for parameter in readouts.parameters():
            parameter.grad = reduce(parameter.grad, "mean")

    optimizer.register_step_pre_hook(share)
    optimizer.register_step_post_hook(lambda *_: readouts.clear())


def _rate_scale(name: str, anatomy: Anatomy, settings: Training) -> float:
    """Return the factor of a vision parameter: what reads the pixels lies below the first block, what follows them at the top."""
    blocks = anatomy.axes["vision.blocks"]
    depth = -1
    if blocks.layers and name.startswith(blocks.layers + "."):
        depth = int(name[len(blocks.layers) + 1 :].split(".")[0])
    elif "embed" not in name:
        depth = blocks.size - 1
    return float(settings.vision_rate * settings.layer_decay ** (blocks.size - 1 - depth))
