"""The cuts of a round: how units are chosen, and trials of one axis at a time."""

from types import SimpleNamespace

import pytest

from slimlmm import bridging, checkpoint, cutting, importance, recipe, repair, sensitivity
from slimlmm.anatomy import describe
from slimlmm.calibration import calibration_of, loss_against
from slimlmm.collate import Collator
from slimlmm.progress import Quiet
from slimlmm.teacher import TeacherCache


@pytest.mark.parametrize("way", ["ablation", "taylor", "last", "random"])
def test_every_way_to_rank_blocks_keeps_as_many_as_asked_in_order(way, teacher, rows, tmp_path):
    loaded = checkpoint.load(teacher)
    collator = Collator(loaded.processor, packed=True)
    job = SimpleNamespace(
        cache=TeacherCache(loaded.model, collator, tmp_path),
        recipe=recipe.Recipe(shrink=2),
    )
    turn = recipe.Round(sizes={"vision.blocks": 2}, blocks=way)
    by = calibration_of(rows.train[:20], collator, loaded.model.device), loss_against(job.cache)
    seen = cutting.sight(job, loaded.model, turn, "vision.blocks", by)
    kept = cutting.chosen(job, loaded.model, turn, ("vision.blocks", 2), by, seen)["vision.blocks"].tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == 2
    if way == "taylor":
        anatomy = describe(loaded.model.config)
        scores = importance.score(loaded.model, anatomy, ["vision.blocks"], "taylor", by[0].fit, by[1])["vision.blocks"]
        assert set(kept) == set(scores.topk(2).indices.tolist())


@pytest.mark.parametrize(
    ("axis", "way"),
    [
        ("text.blocks", "last"),
        ("text.queries", "magnitude"),
        ("text.ffn", "obs"),
        ("vision.ffn", "obs"),
        ("text.width", "taylor"),
        ("text.head_dim", "taylor"),
    ],
)
def test_the_way_that_is_recorded_is_the_one_that_decides(axis, way, teacher):
    model = checkpoint.load(teacher).model
    assert cutting.criterion_of(recipe.Round(blocks="last", groups="magnitude"), model, axis) == way
    unrefitted = recipe.Round(blocks="last", groups="magnitude", repair=("merge",))
    assert cutting.criterion_of(unrefitted, model, axis) == ("taylor" if way == "obs" else way)
    assert (
        cutting.criterion_of(recipe.Round(criterion="random", groups="random", blocks="random"), model, axis)
        == "random"
    )


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [("text.ffn", (64, 32)), ("text.width", (48, 24)), ("vision.kv_groups", (2, 1)), ("vision.blocks", (2, 1))],
)
def test_sizes_of_an_axis_share_what_they_can_and_cost_what_they_cost_alone(
    axis, sizes, teacher, rows, tmp_path, monkeypatch
):
    loaded = checkpoint.load(teacher)
    job = SimpleNamespace(
        cache=TeacherCache(loaded.model, Collator(loaded.processor, packed=True), tmp_path),
        calibration=rows.train[:20],
        recipe=recipe.Recipe(shrink=2),
        tell=Quiet(),
    )

    def trials():
        return cutting.Trials(job, loaded.model, loaded.processor, sensitivity.TRIAL, tmp_path)

    alone = {size: trials().loss(axis, size) for size in sizes}
    seen, scored, collected, left_out = trials(), [], [], []
    calls_of = ((importance, "score", scored), (repair, "collect", collected), (bridging, "mean_loss", left_out))
    for module, name, calls in calls_of:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, calls=calls, **k: (calls.append(1), real(*a, **k))[1])
    assert {size: seen.loss(axis, size) for size in sizes} == alone
    blocks = axis == "vision.blocks"
    # three blocks: each left out once, then each of the two that stay
    assert (len(scored), len(collected), len(left_out)) == ((0, 0, 3 + 2) if blocks else (1, 1, 0))
    seen.loss("text.kv_groups", 1)
    assert seen.loss(axis, sizes[0]) == alone[sizes[0]]
    assert len(scored) == (1 if blocks else 3)
    if blocks:  # from a smaller size there is no way back to a larger one
        assert seen.loss(axis, sizes[1]) == alone[sizes[1]]
        assert seen.loss(axis, sizes[0]) == alone[sizes[0]]
    judges = calibration_of(job.calibration, Collator(loaded.processor, packed=True), loaded.model.device).judge
    assert seen.uncut() == importance.mean_loss(loaded.model.eval(), judges, loss_against(job.cache))
