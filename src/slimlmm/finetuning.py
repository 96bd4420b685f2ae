"""Fine-tuning of a model on one's own rows: trainings in turn, each of which goes on where it was killed.

.OUT.training/{run.json, before-validation.json, parts/, training/}    beside OUT, until OUT is written
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimlmm import checkpoint, data, demands, leaving, measure
from slimlmm import recipe as recipes
from slimlmm.collate import Prompter
from slimlmm.distill import TrainResult, train
from slimlmm.enduring import enduring, put_back
from slimlmm.errors import UserError
from slimlmm.evaluate import Evaluation, evaluate
from slimlmm.journal import Journal, Parts
from slimlmm.pictures import USUAL, PictureSettings
from slimlmm.progress import Reporter
from slimlmm.runfolder import RunFolder, held
from slimlmm.saving import SAVE_EVERY, Saving
from slimlmm.settings import read_yaml
from slimlmm.snapshot import evaluated, identity_of
from slimlmm.trainings import Training

#: validation rows that are looked at before and after
LOOKED_AT = 500
#: passes over the train rows, and losses, where nothing else is said
EPOCHS, LOSSES = 3.0, {"cross_entropy": 1.0}


def trainings(path: Path | None, rows: Sequence[data.Row], epochs: float | None) -> list[Training]:
    """Return the trainings of a YAML list, or one that passes `epochs` times over the rows."""
    if path is not None and epochs is not None:
        raise UserError(f"--epochs {epochs:g} has no effect beside --recipe {path}, which says steps; leave one out.")
    epochs = EPOCHS if epochs is None else epochs
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs {epochs:g}: give a number above 0.")
    if path is None:
        pictures = len(data.by_picture(rows, 16))
        steps = math.ceil(epochs * math.ceil(pictures / 16))  # an epoch ends in a part of a step
        return [Training(steps=steps, learning_rate=2e-4, vision_rate=0.4, layer_decay=0.85, losses=LOSSES)]
    raw = read_yaml(path, "list of trainings")
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{path}: must be a list of trainings, each with steps, learning_rate ...")
    told = [{"losses": LOSSES, **one} if isinstance(one, Mapping) else one for one in raw]
    return recipes.parse_trainings(told, str(path))


def finetune(
    model: str,
    source: Path,
    out: Path,
    *,
    recipe: Path | None,
    epochs: float | None,
    seed: int,
    tell: Reporter,
    allowed: PictureSettings = USUAL,
    trust_remote_code: bool = False,
    save_every: float = SAVE_EVERY,
) -> dict[str, Any]:
    """Fine-tune on the train rows and save; validation accuracy before and after. Killed, the same call goes on where it was.

    Raises:
        UserError: bad model, data or recipe, or a half-finished fine-tuning of another model, data set or recipe lies there.
    """
    checkpoint.refuse_foreign(out.expanduser().absolute())
    loaded = checkpoint.load_to_answer(model, trust_remote_code=trust_remote_code)
    splits = data.load(source, allowed=allowed)
    for note in (*splits.notes, *Prompter(loaded.processor).notes([*splits.train, *splits.validation])):
        tell.say(note)
    rows = splits.need("train", source)
    validation = data.sample(splits.need("validation", source), LOOKED_AT, seed)
    phases = trainings(recipe, rows, epochs)
    for settings in phases:
        demands.check(settings, rows, None, None, validation, None)
    told = json.dumps([one.model_dump(mode="json") for one in phases])
    identity = identity_of(loaded, {"train": rows, "validation": validation}) | {"trainings": told, "seed": seed}
    place = out.expanduser().absolute().with_name(f".{out.name}.training")
    folder = RunFolder(place)
    with held(place, identity):
        before = evaluated(folder, loaded, validation, tell, "before-validation")
        trained, processor, done = _trained(loaded, (rows, validation), phases, seed, folder, before, tell, save_every)
        after = evaluate(trained, processor, validation)
        checkpoint.save(trained, processor, out, source=loaded.path)
    shutil.rmtree(place)
    return {
        "out": str(out),
        "validation_before": before.summary.model_dump(),
        "validation_after": after.summary.model_dump(),
        "row_visits": sum(one.row_visits for one in done),
        "seconds": sum(one.seconds for one in done),
        "flops": sum(one.flops for one in done),
        "seed": seed,
        "model_fingerprint": identity["model"],
        "rows_fingerprint": identity["data"],
        "environment": measure.environment().model_dump(),
    }


def _trained(
    loaded: checkpoint.Loaded,
    rows: tuple[list[data.Row], list[data.Row]],
    phases: Sequence[Training],
    seed: int,
    folder: RunFolder,
    before: Evaluation,
    tell: Reporter,
    save_every: float,
) -> tuple[Any, Any, list[TrainResult]]:
    """Make the trainings that are not made yet; return model, processor and what each training took."""
    journal = Journal(folder.path)
    model, processor, (train_rows, validation) = loaded.model, loaded.processor, rows
    parts = Parts(cut_score=before.summary.overall)
    if (number := journal.last()) is None:
        journal.keep(0, model, processor, parts)
    else:
        tell.say("fine-tuning goes on", trainings_done=number)
        (model, processor), parts = journal.model(number, model.device), journal.taken_up(number)
    for index in range(len(parts.trained), len(phases)):
        what = f"fine-tuning {index + 1}/{len(phases)}"

        def make(settings: Training, index: int = index, what: str = what) -> TrainResult:
            return train(
                model,
                processor,
                train_rows,
                settings,
                folder.path / "training",
                validation=validation,
                seed=seed,
                progress=lambda facts: tell.step(what, facts["step"], facts["steps"], loss=facts["loss"]),
                saving=Saving(save_every, f"{index}, seed {seed}, {settings.model_dump_json()}", tell.say),
            )

        def reset(index: int = index) -> None:
            put_back(journal.model(index, model.device)[0], model)

        def say(text: str, what: str = what) -> None:
            tell.say(f"{what}: {text}")

        parts.trained.append(enduring(make, phases[index], reset, say))
        journal.keep(index + 1, model, processor, parts)
        leaving.heed(f" after {what}, which is on disk")
    return model, processor, parts.trained


def finetuned(found: dict[str, Any]) -> str:
    """Return the sentence that `finetune` prints."""
    before, after = (found[key]["overall"] for key in ("validation_before", "validation_after"))
    return (
        f"validation exact match {100 * before['accuracy']:.1f} % -> {100 * after['accuracy']:.1f} % of {after['n']} rows, "
        f"{found['row_visits']:,} row visits in {found['seconds']:.0f} s: {found['out']}"
    )
