"""What repair wins back right after a cut, before any training: python benchmarks/repair.py OUT.json.

The bundled teacher on AdReview: each cut is made with the same units, sliced, repaired axis by axis (`repair.fold_best`,
`bridging.bridge_best`), and then settled (`settling.settle_best`); all of them answer the same validation rows. Won back is
(repaired - sliced) / (whole - sliced). Seconds are those of the repairs alone: moments, trials and their calibration losses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slimlmm import adreview, bridging, checkpoint, cutting, data, importance, measure, plan, repair, settling, surgery
from slimlmm.anatomy import describe
from slimlmm.axes import noun_of
from slimlmm.calibration import EACH, Calibration, calibration_of, loss_against
from slimlmm.collate import Collator
from slimlmm.demo import bundled
from slimlmm.evaluate import Evaluation, drop, evaluate
from slimlmm.recipe import REPAIRS, Round
from slimlmm.teacher import TeacherCache

CASES = {
    "inner: half of FFN and heads": {"text.ffn": 640, "vision.ffn": 768, "text.kv_groups": 2, "vision.kv_groups": 3},
    "width: half of both": {"text.width": 288, "vision.width": 192},
    "blocks: vision 7 -> 5, text 3 -> 2": {"vision.blocks": 5, "text.blocks": 2},
}
#: rows that cuts and repairs are fitted on
CALIBRATION = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    loaded = checkpoint.load(bundled("teacher"))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "ads"
        adreview.write(folder, train=10 * CALIBRATION, val=options.rows, test=10, seed=options.seed)
        rows = data.load(folder)
        model = surgery.living(loaded.model)
        collator = Collator(loaded.processor, packed=True)
        cache = TeacherCache(model, collator, Path(parent) / "cache")
        calibration = calibration_of(data.spread(rows.train, CALIBRATION, EACH, options.seed), collator, model.device)
        for batch in (*calibration.fit, *calibration.judge):
            cache.of(batch)  # now: the teacher is the very model whose blocks are left out while they are judged
        whole = evaluate(model, loaded.processor, rows.validation)
        found: dict[str, Any] = {"whole": whole.accuracy, "n": len(rows.validation), "cases": {}}
        for name in options.cases:
            found["cases"][name] = case(
                model, loaded.processor, CASES[name], calibration, cache, (whole, rows.validation)
            )
            print(name, json.dumps(found["cases"][name]), flush=True)
    found |= {"calibration_rows": CALIBRATION, "seed": options.seed, "environment": measure.environment().model_dump()}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def case(
    model: Any,
    processor: Any,
    sizes: dict[str, int],
    calibration: Calibration,
    cache: TeacherCache,
    against: tuple[Evaluation, list[data.Row]],
) -> dict[str, Any]:
    """Cut all axes in turn, sliced and repaired, by the units that the repaired model's scores choose."""
    loss = loss_against(cache)
    sliced = repaired = model
    spent, tried = 0.0, {}
    kept: dict[str, list[int]] = {}
    for axis, size in sizes.items():
        anatomy = describe(repaired.config)
        keep = chosen(repaired, anatomy, axis, size, calibration, loss)
        sliced = surgery.cut(sliced, anatomy, axis, keep)
        began = time.perf_counter()
        if noun_of(axis) == "blocks":
            kept[axis] = keep[axis].tolist()
            repaired, tries = bridging.bridge_best(repaired, anatomy, axis, keep, calibration, loss)
        else:
            done = repair.fold_best(repaired, anatomy, axis, keep, calibration, loss, REPAIRS)
            repaired, tries = done.model, done.tries
        spent += time.perf_counter() - began
        tried[axis] = {one.name: one.loss for one in tries}
    began = time.perf_counter()
    after, tries = settling.settle_best(repaired, model, kept, calibration, loss)
    tried["settling"] = {one.name: one.loss for one in tries}
    settle_seconds = time.perf_counter() - began
    models = {"sliced": sliced, "repaired": repaired, "settled": after}
    return {
        "sizes": sizes,
        "parameters": repaired.num_parameters(),
        **answered(models, processor, against),
        "repair_seconds": spent,
        "settle_seconds": settle_seconds,
        "calibration_losses": tried,
    }


def answered(models: dict[str, Any], processor: Any, against: tuple[Evaluation, list[data.Row]]) -> dict[str, Any]:
    """Let all models answer the rows, and say what the repaired ones win back."""
    whole, rows = against
    answers = {name: evaluate(one, processor, rows) for name, one in models.items()}
    lost = whole.accuracy - answers["sliced"].accuracy
    return {
        **{name: one.accuracy for name, one in answers.items()},
        "gain": drop(answers["settled"], answers["sliced"]).model_dump(),
        "won_back": {
            name: (answers[name].accuracy - answers["sliced"].accuracy) / lost if lost > 0 else None
            for name in ("repaired", "settled")
        },
    }


def chosen(model: Any, anatomy: Any, axis: str, size: int, calibration: Calibration, loss: Any) -> Any:
    """Return the units that stay: blocks by ablation, bridged, groups by ablation, FFNs by OBS, others by Taylor."""
    if noun_of(axis) == "blocks":
        count = anatomy.axis(axis).groups[0].kept(size)
        return {axis: torch.tensor(bridging.greedy_bridged(model, anatomy, axis, calibration, loss, count))}
    criterion = cutting.criterion_of(Round(), model, axis)
    batches = calibration.rank if criterion == "ablation" else calibration.fit
    return plan.choose(importance.score(model, anatomy, [axis], criterion, batches, loss), anatomy, axis, size)


if __name__ == "__main__":
    main()
