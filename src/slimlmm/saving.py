"""A training that may be killed at any step: its whole state on disk now and then, whole or not at all, and taken up again.

    OUT/checkpoint-STEP/  weights.safetensors  optimizer.pt  scheduler.pt  rng_state.pth  trainer_state.json
                          more.safetensors  more.json  whole.json

The Trainer writes optimizer, schedule and random numbers and goes on in the middle of an epoch; weights are ours, because
`save_pretrained` may give them other names than the model has, and a load that forgives that would go on from the wrong ones.
``whole.json`` comes last and holds size and SHA-256 of every other file and what the training is: a folder without it, or one
that differs from it, is removed and never read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from slimlmm import leaving
from slimlmm.errors import UserError
from slimlmm.files import flush, sha256, write_json

#: seconds between two states on disk, unless otherwise said
SAVE_EVERY = 300.0
WHOLE = "whole.json"
WEIGHTS = "weights.safetensors"
OTHER = "is of another training"
#: figures and tensors that neither model nor optimizer holds
More = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Saving:
    """How often the state is written, in seconds, what the training is (the state of another is not taken up), who tells."""

    seconds: float
    of: str
    say: Callable[[str], None]


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints hold the weights by the names that they have in the model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights, tied ones once; sharded models are written by the Trainer itself."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.contiguous() for name, value in _once(self._whole(None))}, Path(output_dir) / WEIGHTS
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the weights back; all of them must be there."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        for name, value in _once(self._whole(model)):
            value.copy_(stored.pop(name))
        assert not stored

    def _whole(self, model: nn.Module | None) -> nn.Module:
        found = model or self.model
        assert found is not None
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the state; a disk that refuses is told with its numbers, and the state before stays."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise no_room(Path(self.args.output_dir or "."), self.state.global_step, error) from error


def no_room(folder: Path, step: int, error: Exception) -> UserError:
    """Return what is said where the state of a training cannot be written."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{folder}: the state of training at step {step} cannot be written ({told}; {free / 1e6:,.0f} MB are free there). "
        "Make room and give the same command again: it goes on from the state before."
    )


def _once(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and kept buffers by name, those that share memory under their first name."""
    seen: dict[tuple[int, Any], str] = {}
    found = []
    for name, value in model.state_dict().items():
        if seen.setdefault((value.data_ptr() or id(value), value.shape), name) == name:
            found.append((name, value))
    return found


class Saver(TrainerCallback):
    """Has the state written every so many seconds, and when the process is told to stop, which it then does."""

    def __init__(self, out: Path, saving: Saving, more: Callable[[], More], before: Callable[[], None]) -> None:
        self.out, self.saving, self.more, self.before = out, saving, more, before
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint when it is time; after the last step there is none, as the round writes what came out."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        due = time.monotonic() - self.last >= self.saving.seconds or leaving.asked()
        if due and not last:
            self.before()
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add what the Trainer does not know, sign the checkpoint, remove those before."""
        folder = self.out / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero:
            figures, tensors = self.more()
            try:
                save_file(tensors, folder / "more.safetensors")
                write_json(folder / "more.json", figures)
                _sign(folder, self.saving.of)
            except (OSError, SafetensorError) as error:
                raise no_room(self.out, state.global_step, error) from error
            for other in self.out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if other != folder:
                    shutil.rmtree(other)
        self.last = time.monotonic()
        leaving.heed(f" after step {state.global_step} of {state.max_steps}, which is on disk")


def _sign(folder: Path, of: str) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / WHOLE, {"of": of, "files": files})


def latest(out: Path, of: str, say: Callable[[str], None]) -> Path | None:
    """Return the latest whole checkpoint of this training, None where there is none; others are removed, and that is said."""
    found = sorted(out.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    faults = {path: _fault(path, of) for path in found}  # once: each is a hash of all that is there
    whole = [path for path in found if not faults[path]]
    for path in found:
        if path not in whole[-1:]:
            if faults[path] not in (None, OTHER):
                say(f"{path}: {faults[path]}; removed")
            shutil.rmtree(path)
    return whole[-1] if whole else None


def _fault(folder: Path, of: str) -> str | None:
    """Return what is wrong with a checkpoint, None where nothing is."""
    if not (folder / WHOLE).exists():
        return "was not written to its end"
    try:
        told = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
        files = told["files"]
        if told["of"] != of:
            return OTHER
        wrong = [
            name
            for name, facts in files.items()
            if not (folder / name).is_file()
            or (folder / name).stat().st_size != facts["bytes"]
            or sha256(folder / name) != facts["sha256"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {WHOLE} cannot be read"
    return f"{', '.join(wrong)} is not what was written" if wrong else None


def more_of(folder: Path) -> More:
    """Return what the Trainer does not know of a checkpoint."""
    figures: dict[str, Any] = json.loads((folder / "more.json").read_text(encoding="utf-8"))
    return figures, load_file(folder / "more.safetensors")
