"""The demo: the bundled teacher compressed live on AdReview, and the bundled 18x student evaluated beside it."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import Any

from slimlmm import adreview, checkpoint, data, pipeline, recipe, results
from slimlmm.errors import UserError
from slimlmm.evaluate import evaluate
from slimlmm.progress import Reporter

#: rows written for the demo: about as many pictures as the live rounds visit, and a test split with an error near 1 point
ROWS = {"train": 9_000, "val": 1_000, "test": 1_000}


BUNDLE = Path(str(resources.files("slimlmm"))) / "bundled"


def bundled(name: str) -> Path:
    """Return a bundled model or recipe, or refuse with what to do where this checkout lacks it."""
    path = BUNDLE / name
    if not path.exists():
        raise UserError(
            f"this checkout has no bundled {name}. Build the teacher with `python scripts/build_teacher.py` "
            "(pip install -e '.[build-teacher]' first), the student with `make headline`."
        )
    return path


def demo(out: Path, *, command: str, tell: Reporter) -> dict[str, Any]:
    """Write AdReview, compress the bundled teacher by the demo recipe, then evaluate the bundled student on the same rows."""
    began = time.perf_counter()
    teacher = bundled("teacher")
    folder = out / "adreview"
    if not (folder / "version.json").exists():
        tell.say("writing AdReview", **ROWS)
        adreview.write(folder, train=ROWS["train"], val=ROWS["val"], test=ROWS["test"], seed=0)
    live = pipeline.run(teacher, folder, out / "run", recipe.read(bundled("demo.yaml")), command=command, tell=tell)
    found: dict[str, Any] = {"live": live.model_dump(mode="json"), "folder": str(out / "run")}
    headline = BUNDLE / "student" / "results.json"
    if headline.exists():
        student = checkpoint.load_to_answer(BUNDLE / "student" / "model")
        rows = data.load(folder).need("test", folder)
        tell.say("evaluating the bundled student")
        answers = evaluate(student.model, student.processor, rows)
        found["student"] = {
            "accuracy": answers.summary.model_dump(),
            "parameters": student.model.num_parameters(),
            "headline": results.Results.load(headline).model_dump(mode="json"),
        }
    found["seconds"] = time.perf_counter() - began
    return found
