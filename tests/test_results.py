"""The typed record of a run: it survives the disk, refuses what it does not know, and its page is current."""

from dataclasses import replace
from pathlib import Path

import pytest

from slimlmm import evaluate as ev
from slimlmm import recipe
from slimlmm import results as rs
from slimlmm.errors import UserError
from slimlmm.measure import Comparison, Memory, Timing, environment
from slimlmm.recipe import Recipe
from test_evaluate import rows_of


def graded(right: int, *, tasks: bool = True) -> ev.Evaluation:
    """An evaluation of 30 rows, 10 pictures, two tasks, of which the first `right` are answered right."""
    rows = rows_of(10) if tasks else [replace(row, task="") for row in rows_of(10)]
    answers = ["food" if i < right else "wrong" for i in range(30)]
    return ev.grade(rows, answers, [row.picture_key() for row in rows], max_new_tokens=6)


def timing(p50: float, batch_size: int = 1) -> Timing:
    return Timing(p50=p50, p95=1.5 * p50, n=50, batch_size=batch_size, rows_per_second=batch_size / p50)


def comparison(a: float, b: float, batch_size: int = 1) -> Comparison:
    return Comparison(
        first=timing(a, batch_size),
        second=timing(b, batch_size),
        ratio=a / b,
        ratio_min=0.9 * a / b,
        ratio_median=a / b,
        ratio_max=1.2 * a / b,
    )


def model(name: str, scale: float, accuracy: ev.Accuracy) -> rs.Model:
    counts = {"vision": int(9e6 * scale), "text": int(7e6 * scale), "embeddings": int(1e6 * scale)}
    return rs.Model(
        name=name,
        model_type="llava",
        sizes={"text.ffn": int(1536 * scale), "vision.blocks": 6},
        parameters={**counts, "total": sum(counts.values())},
        disk_bytes=int(68e6 * scale),
        accuracy=accuracy,
        validation=accuracy.overall,
        flops=4e9 * scale,
        flops_answer_tokens=8,
        memory=Memory(kind="rss", before=4 * 10**8, peak=int(4e8 + 2e8 * scale)),
    )


def sample() -> rs.Results:
    """A finished run with every field in use."""
    teacher, student = graded(28), graded(24)
    a, b = model("teacher", 1.0, teacher.summary), model("final", 0.25, student.summary)
    latency, throughput = comparison(0.087, 0.0197), comparison(1.5, 0.18, 32)
    rounds = tuple(
        rs.Round(
            number=i + 1,
            stage=stage,
            round=turn,
            criterion="taylor",
            before={axis: before},
            after={axis: after},
            parameters_before=int(17e6 / 1.5**i),
            parameters=int(17e6 / 1.5 ** (i + 1)),
            after_cut=graded(cut).summary.overall,
            after_recovery=graded(recovered).summary.overall,
            losses={"total": 0.5, "forward_kl": 0.2},
            steps=100,
            row_visits=25_600,
            seconds=240.0,
            flops=1e15,
        )
        for i, (stage, turn, axis, before, after, cut, recovered) in enumerate(
            [
                ("blocks", 1, "vision.blocks", 11, 8, 9, 27),
                ("inner", 1, "text.ffn", 1536, 1024, 22, 27),
                ("width", 1, "text.width", 576, 384, 15, 25),
            ]
        )
    )
    control = rs.Control(
        name="scratch",
        description="Same shape from random initialisation, same rows and steps.",
        parameters=b.parameters["total"],
        accuracy=graded(12).summary,
        behind=ev.drop(student, graded(12), samples=200),
        row_visits=76_800,
        seconds=600.0,
    )
    return rs.Results(
        name="adreview-4x",
        command="slimlmm compress teacher --data adreview --shrink 4",
        seed=0,
        environment=environment(),
        data=rs.Dataset(name="adreview-1", fingerprint="ab12", rows={"train": 12_000, "validation": 900, "test": 30}),
        teacher=a,
        rounds=rounds,
        student=b,
        effect=rs.effect(teacher, student, samples=200),
        latency=latency,
        throughput=throughput,
        ratios=rs.ratios(a, b, latency, throughput),
        controls=(control,),
        totals=rs.totals(rounds, 60.0),
        notes=("A sample.",),
    )


def unfinished() -> rs.Results:
    """A run without rounds, student or accuracy."""
    bare = sample().teacher.model_copy(update={"accuracy": None, "memory": None, "flops": None, "disk_bytes": None})
    keep = {name: getattr(sample(), name) for name in ("name", "seed", "environment", "data")}
    return rs.Results(**keep, teacher=bare)


def test_saved_results_load_as_they_were(tmp_path):
    for results in (sample(), unfinished()):
        results.save(tmp_path / "results.json")
        assert rs.Results.load(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "schema version 1: Invalid JSON"),
        ("{}", "name: Field required"),
        ('{"schema_version": 9}', "schema_version: Input should be 1"),
        ('{"surprise": 1}', "surprise: Extra inputs"),
    ],
)
def test_another_file_is_refused_by_field(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a results file") as caught:
        rs.Results.load(path)
    assert message in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        rs.Results.load(tmp_path / "absent.json")


def test_the_schema_page_is_current():
    page = Path(__file__).parents[1] / "docs" / "results-schema.md"
    assert page.read_text() == rs.schema_page(), "run: python -m slimlmm.results docs/results-schema.md"


def test_every_field_is_described():
    schema = rs.Results.model_json_schema()
    for name, record in {"Results": schema, **schema["$defs"]}.items():
        assert record["description"], name
        for field, value in record["properties"].items():
            assert value["description"].endswith((".", "...")), f"{name}.{field}"


def test_ratios_of_what_was_measured():
    results = sample()
    found = results.ratios
    assert found.parameters == pytest.approx(4.0)
    assert found.latency == pytest.approx(0.087 / 0.0197)
    assert found.memory == pytest.approx(6 / 4.5)
    bare = rs.ratios(unfinished().teacher, results.student)
    assert (bare.disk, bare.flops, bare.latency, bare.throughput, bare.memory) == (None,) * 5


def test_totals_do_not_invent_flops():
    rounds = sample().rounds
    assert rs.totals(rounds, 60.0) == rs.Totals(seconds=780.0, row_visits=76_800, flops=3e15)
    unknown = (rounds[0].model_copy(update={"flops": None}), *rounds[1:])
    assert rs.totals(unknown).flops is None
    untrained = (rounds[0].model_copy(update={"flops": None, "steps": 0}), *rounds[1:])
    assert rs.totals(untrained).flops == 2e15


def test_effect_is_paired_and_per_task():
    effect = rs.effect(graded(28), graded(24), samples=200)
    assert effect.drop.mean == pytest.approx(4 / 30)
    assert set(effect.drop_tasks) == {"task 0", "task 1"}
    assert effect.agreement == pytest.approx(26 / 30)


def test_rows_without_a_task_are_not_judged_as_one():
    one, other = graded(28, tasks=False), graded(24, tasks=False)
    found = rs.effect(one, other, samples=200)
    assert found.drop_tasks == one.summary.tasks == {}
    assert one.summary.macro == one.accuracy
    assert rs.promise(found, recipe.Recipe(max_drop=5.0)).tasks == {}


def test_a_look_that_gave_no_number_is_null():
    look = rs.Look(step=3, loss=float("nan"))
    assert rs.Look.model_validate_json(look.model_dump_json()).loss is None


def test_a_shrink_that_was_missed_is_told_with_both_numbers():
    asked = recipe.Recipe(shrink=4.0)
    assert rs.short_of(asked, 4.0, []) == rs.short_of(recipe.Recipe(), 2.0, []) == []
    (note,) = rs.short_of(asked, 3.9381, [])
    assert note.startswith(
        "4 times fewer parameters were asked for, 3.938 times fewer are left: cuts that were planned"
    )
    missed = rs.Round(number=1, stage="x", round=1, before={}, after={}, parameters_before=2, parameters=1, seconds=0)
    assert "the promise was missed" in rs.short_of(asked, 3.0, [missed])[0]


def test_few_rows_without_a_difference_prove_no_promise():
    rows = rows_of(10)
    same = ev.grade(rows, ["food"] * 30, [row.picture_key() for row in rows], max_new_tokens=6)
    found = rs.promise(rs.effect(same, same, samples=2000), Recipe(max_drop=2.0))
    assert (found.overall, set(found.tasks.values())) == ("undecided", {"undecided"})
    alone = ev.grade(rows, ["food"] * 30, ["one picture"] * 30, max_new_tokens=6)
    assert rs.promise(rs.effect(alone, alone), Recipe(max_drop=90.0)).overall == "undecided"
    many = ev.grade(rows * 10, ["food"] * 300, [str(n) for n in range(300)], max_new_tokens=6)
    assert rs.promise(rs.effect(many, many, samples=2000), Recipe(max_drop=2.0)).overall == "kept"
