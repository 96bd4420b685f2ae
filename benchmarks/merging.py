"""What merging dropped heads wins over refitting what reads the kept ones: python benchmarks/merging.py OUT.json.

The bundled teacher on AdReview, one axis cut at a time, the same units each time: sliced, refitted, merged. Loss (CE + KL, mean
per answer token) on the pictures of the fit and on others; exact match on validation rows. Seconds are those of the repair.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slimlmm import adreview, checkpoint, data, importance, measure, merging, plan, repair, surgery
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.demo import bundled
from slimlmm.evaluate import drop, evaluate
from slimlmm.forward import answer_logits
from slimlmm.losses import Seen, combine
from slimlmm.teacher import TeacherCache

CASES = {"vision.kv_groups": 3, "text.kv_groups": 2, "text.queries": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=100, help="pictures of the fit; 25 others are held out")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    loaded = checkpoint.load(bundled("teacher"))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "ads"
        adreview.write(folder, train=11 * (options.pictures + 30), val=options.rows, test=10, seed=options.seed)
        rows = data.load(folder)
        model = surgery.living(loaded.model)
        collator = Collator(loaded.processor, packed=True)
        cache = TeacherCache(model, collator, Path(parent) / "cache")
        groups = data.by_picture(rows.train, 16)[: options.pictures + 25]
        batches = [collator(groups[at : at + 4]) for at in range(0, len(groups), 4)]
        for batch in batches:
            cache.of(batch)
        fit = batches[: options.pictures // 4]
        found: dict[str, Any] = {"pictures": options.pictures, "n": len(rows.validation), "cases": {}}
        for axis in options.cases:
            others = batches[len(fit) :]
            found["cases"][axis] = case(model, loaded.processor, axis, (fit, others), cache, rows.validation)
            print(axis, json.dumps(found["cases"][axis]), flush=True)
    found |= {"seed": options.seed, "environment": measure.environment().model_dump()}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def case(
    model: Any,
    processor: Any,
    axis: str,
    batches: tuple[list[Any], list[Any]],
    cache: TeacherCache,
    rows: list[data.Row],
) -> dict[str, Any]:
    """Cut one axis three ways."""

    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits_AV, labels_A, _ = answer_logits(model, batch)
        seen = Seen(logits_AV, labels_A, cache.logits(cache.of(batch)))
        return combine({"cross_entropy": 1.0, "forward_kl": 1.0}, seen)["total"] / labels_A.numel()

    anatomy = describe(model.config)
    scores = importance.score(model, anatomy, [axis], "taylor", batches[0][:8], loss)
    keep = plan.choose(scores, anatomy, axis, CASES[axis])
    merged: list[merging.Merged] = []
    ways: dict[str, Callable[[Any], Any]] = {
        "sliced": lambda _: None,
        "refitted": lambda one: repair.fold(
            one, anatomy, axis, keep, repair.collect(model, anatomy, axis, batches[0]), turn=False
        ),
        "merged": lambda one: merged.extend(merging.merge(one, anatomy, axis, keep, batches[0])),
    }
    told, answers = {}, {}
    for name, way in ways.items():
        began, trial = time.perf_counter(), copy.deepcopy(model)
        way(trial)
        seconds = time.perf_counter() - began
        cut = surgery.cut(trial, anatomy, axis, keep)
        answers[name] = evaluate(cut, processor, rows)
        fitted, unseen = (importance.mean_loss(cut, some, loss) for some in batches)
        told[name] = {"fit": fitted, "unseen": unseen, "exact": answers[name].accuracy, "seconds": seconds}
        print(axis, name, told[name], flush=True)
    errors = [{"error": one.error, "refit": one.refit_error, "ridge": one.ridge} for one in merged]
    gain = drop(answers["merged"], answers["refitted"]).model_dump()
    return {"ways": told, "merged_over_refitted": gain, "held_out": errors}


if __name__ == "__main__":
    main()
