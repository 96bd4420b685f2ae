"""Against overfitting: look at validation rows now and then, keep the best weights, stop when they are long past."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimlmm.collate import Batch
from slimlmm.errors import LossError
from slimlmm.forward import answer_logits, to_device
from slimlmm.losses import cross_entropy


@torch.inference_mode()
def validation_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Return the mean cross-entropy per answer token of the labels, in evaluation mode; nats."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        with torch.compiler.set_stance(
            "force_eager"
        ):  # a compiled training looks seldom: this mode is not worth compiling
            logits_AV, labels_A, _ = answer_logits(model, to_device(batch, model.device))
        total += float(cross_entropy(logits_AV.float(), labels_A))
        count += labels_A.numel()
    model.train(training)
    return total / count


class KeepBest(TrainerCallback):
    """Measure `validation_loss` every so many steps and at the end; the weights of the least one are what training leaves.

    Training stops after `patience` looks in a row without a new best. One copy of the trained weights is held beside the model,
    in the memory of the CPU. `looks` are (step, loss), `kept` is the step of the weights that stay.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], every: int, patience: int) -> None:
        self.model, self.batches, self.every, self.patience = model, batches, every, patience
        self.looks: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """Step of the least loss, the first of equal ones; 0 where no look gave a number."""
        numbers = [look for look in self.looks if math.isfinite(look[1])]
        return min(numbers, key=lambda look: look[1])[0] if numbers else 0

    def take_up(self, looks: Sequence[Sequence[float]], best: Mapping[str, Tensor]) -> None:
        """Go on from these looks and the best weights of them."""
        self.looks = [(int(step), loss) for step, loss in looks]
        self.best = dict(best)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look, at every so many steps and after the last one."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        loss = validation_loss(self.model, self.batches)
        self.looks.append((state.global_step, loss))
        if self.kept == state.global_step:
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}
        misses = sum(step > self.kept for step, _ in self.looks)
        control.should_training_stop |= misses >= self.patience

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the best weights back where later steps were no better; refuse those of which no look gave a number."""
        if self.looks and not self.kept:
            raise LossError(
                f"the loss on validation rows was no number at any of {len(self.looks)} looks; lower train.learning_rate in the "
                "recipe."
            )
        if self.best and self.kept != state.global_step:
            with torch.no_grad():
                for name, parameter in self._trained():
                    parameter.copy_(self.best[name])
        self.best = {}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
