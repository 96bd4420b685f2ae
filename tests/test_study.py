"""Running studies: resumed, failures told, statistics against brute force, the page from the record alone."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from slimlmm import checkpoint, pipeline, recipe, rounds, studies, study, study_page
from slimlmm import study_results as sr
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import grade, paired_test
from slimlmm.measure import environment
from slimlmm.trainings import Training
from test_cli import call
from test_pipeline import Recorder
from tiny import tiny

SEEDS = (0, 1, 2)


def answered(right, per_picture=2):
    """Return the evaluation of rows of which these were answered right."""
    rows = [Row(str(n), b"", "q", "yes", "odd" if n % 2 else "even") for n in range(len(right))]
    keys = [f"picture {n // per_picture}" for n in range(len(right))]
    return grade(rows, ["yes" if one else "no" for one in right], keys, max_new_tokens=5)


def drawn(share, seed, n=200):
    return np.random.default_rng(seed).random(n) < share


def made(students, reference="a", **more):
    """Return the record of a study of these arms: name -> seed -> answers; the teacher is right in nine of ten rows."""
    teachers = {seed: answered(drawn(0.9, 99 + seed)) for seed in SEEDS}
    answers = {name: sr.Answers(students=one, teachers={s: teachers[s] for s in one}) for name, one in students.items()}
    arms = {
        name: sr.summarised(sr.Arm(name=name), one, {seed: (1000, 5000, 2.0) for seed in one.students}, {})
        for name, one in answers.items()
    }
    group = studies.Group(title="A | B", arms=tuple(arms), reference=reference, **more)
    return sr.StudyResults(
        name="made",
        model="m",
        data="d",
        seeds=SEEDS,
        environment=environment(),
        teacher=sr.spread([one.accuracy for one in teachers.values()]),
        teacher_parameters=9000,
        arms=tuple(arms.values()),
        groups=(sr.compared(group, answers, arms),),
    )


def test_the_p_value_is_that_of_brute_force():
    a, b = drawn(0.7, 1), drawn(0.6, 2)
    pictures = [str(n // 4) for n in range(len(a))]
    interval, p = paired_test(a, b, pictures, samples=2000, seed=5)
    sums = (a.astype(float) - b).reshape(-1, 4).sum(1)
    order = [int(key) for key in np.unique(pictures)]
    index = np.random.default_rng(5).integers(len(sums), size=(2000, len(sums)))
    means = sums[order][index].mean(1) / 4
    assert interval.mean == pytest.approx(a.mean() - b.mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert p == pytest.approx(2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / 2001)


def test_seeds_are_pooled_and_pictures_drawn_whole():
    first = {seed: answered(drawn(0.8, seed)) for seed in SEEDS}
    second = {seed: answered(drawn(0.6, 10 + seed)) for seed in (*SEEDS, 3)}
    interval, p = sr.pooled(first, second)
    difference = np.stack([first[seed].correct * 1.0 - second[seed].correct for seed in SEEDS])  # [seeds, rows]
    a_picture = difference.reshape(3, -1, 2).mean((0, 2))
    index = np.random.default_rng(7).integers(len(a_picture), size=(20_000, len(a_picture)))
    low, high = np.quantile(a_picture[index].mean(1), [0.025, 0.975])
    assert interval.mean == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)
    assert p < 0.001
    assert sr.pooled(first, first)[1] == 1.0
    with pytest.raises(UserError, match="answered different test rows"):
        sr.pooled({0: first[0]}, {0: answered(drawn(0.6, 3, n=20))})


def test_pictures_whose_folder_moved_between_seeds_stay_the_same_pictures():
    def seeds(right, folders):
        rows = [
            [Row(str(n), Path(folder) / f"{n // 4}.png", "q", "yes") for n in range(len(right))] for folder in folders
        ]
        answers = ["yes" if one else "no" for one in right]
        return {
            number: grade(part, answers, [row.picture_key() for row in part], max_new_tokens=5)
            for number, part in enumerate(rows)
        }

    right = [random.Random(3).random() < 0.7 for _ in range(80)]
    other = [one and random.Random(n).random() < 0.9 for n, one in enumerate(right)]
    stayed, moved = (sr.pooled(seeds(other, at), seeds(right, at)) for at in (["a", "a", "a"], ["a", "b", "c"]))
    assert moved == stayed


def test_keys_of_an_arm_say_nothing_to_trainings_that_cannot_hear_them():
    states = Training(steps=4, losses={"picture_states": 1.0})
    keys = {"validate_every": 2, "stop_after": 5, "own_answers": 0.5, "learning_rate": 1e-3}
    assert study._with(states, keys) == states.model_copy(update={"learning_rate": 1e-3})
    answers = study._with(Training(steps=4), keys)
    assert (answers.validate_every, answers.stop_after, answers.own_answers) == (2, 5, 0.5)


def test_spreads_and_differences_of_a_study():
    students = {
        name: {seed: answered(drawn(p, k + seed)) for seed in SEEDS} for name, p, k in (("a", 0.8, 0), ("b", 0.5, 50))
    }
    found = made(students)
    a, b = found.arms
    values = [one.accuracy for one in students["a"].values()]
    assert a.accuracy.mean == pytest.approx(np.mean(values))
    assert a.accuracy.sd == pytest.approx(np.std(values, ddof=1))
    assert set(a.tasks) == {"odd", "even"}
    assert b.drop_interval.mean == pytest.approx(b.drop.mean)
    told = found.groups[0].differences["b"]
    assert told.interval.mean == pytest.approx(b.accuracy.mean - a.accuracy.mean)
    assert told.seeds[1] == pytest.approx(students["b"][1].accuracy - students["a"][1].accuracy)
    assert told.p < 0.001
    assert told.seeds_p == sr.over_seeds(list(told.seeds.values())) < 0.05
    assert sr.spread([0.5]).sd is None


def test_a_group_says_where_each_seed_has_test_rows_of_its_own():
    same = {seed: answered(drawn(0.8, seed)) for seed in SEEDS}
    own = {seed: answered(drawn(0.8, seed, n=200 + seed)) for seed in SEEDS}
    for students, told in ((same, False), (own, True)):
        group = studies.Group(title="t", arms=("a", "b"), reference="a")
        answers = {name: sr.Answers(students=students, teachers={}) for name in group.arms}
        found = sr.compared(group, answers, {name: sr.Arm(name=name) for name in group.arms})
        assert any("drew test rows of its own" in note for note in found.notes) == told


def test_the_test_over_seeds_is_students():
    differences = [0.3, -0.1, 0.25]
    t = np.mean(differences) / (np.std(differences, ddof=1) / 3**0.5)
    p = 1 - t / (2 + t * t) ** 0.5  # Student's distribution with two degrees of freedom, in closed form
    assert sr.over_seeds(differences) == pytest.approx(p)
    assert sr.over_seeds([-one for one in differences]) == pytest.approx(p)
    assert sr.over_seeds([0.3]) is None
    assert sr.over_seeds([0.25, 0.25]) is None
    equal = [17 / 20 - 16 / 20, 15 / 20 - 14 / 20, 13 / 20 - 12 / 20]
    assert len(set(equal)) > 1, "equal but for rounding"
    assert sr.over_seeds(equal) is None


@pytest.mark.parametrize("x", [{}, {"a": 2, "b": 40, "never": 100}])
def test_the_page_is_drawn_from_the_record_alone(x, tmp_path):
    students = {
        "a": {0: answered(drawn(0.8, 0))},
        "b": {0: answered(drawn(0.5, 1)), 1: answered(drawn(0.5, 2))},
        "never": {},
    }
    found = made(students, x=x)
    found.save(tmp_path / "study.json")
    page = study_page.write([found], tmp_path / "one" / "README.md")
    again = study_page.write([sr.StudyResults.load(tmp_path / "study.json")], tmp_path / "two" / "results.md")
    assert page.read_bytes() == again.read_bytes()
    plots = [sorted((one.parent / "plots").iterdir()) for one in (page, again)]
    assert [one.name for one in plots[0]] == [one.name for one in plots[1]] == ["made-01-a-b.png"]
    assert plots[0][0].read_bytes() == plots[1][0].read_bytes()
    text = page.read_text()
    assert "| a | - | 1 k | 5,000 | 2 s | 1 |" in text
    assert "| never | - | - | - | - | 0 | - | - | - | - | - |" in text
    assert "- Row visits are equal within 0.0 % (from 5,000 to 5,000)." in text


@pytest.mark.parametrize(("first", "scale"), [(0.0, "linear"), (0.25, "log")])
def test_a_curve_from_zero_on_has_a_linear_axis(first, scale):
    found = made({"a": {0: answered(drawn(0.8, 0))}, "b": {0: answered(drawn(0.5, 1))}}, x={"a": first, "b": 1})
    axes = Figure().subplots()
    study_page._curve(axes, found, found.groups[0], found.arms)
    low, high = axes.get_xlim()
    assert axes.get_xscale() == scale
    assert low < first < high


def test_the_committed_page_is_that_of_the_committed_records():
    root = Path(__file__).parents[1]
    order = next(line for line in (root / "Makefile").read_text().splitlines() if line.startswith("STUDIES := "))
    paths = [root / "benchmarks" / "results" / f"study-{name}.json" for name in order.split()[2:]]
    assert sorted(paths) == sorted((root / "benchmarks" / "results").glob("study-*.json"))
    page = study_page._page([study_page.markdown(sr.StudyResults.load(path)) for path in paths])
    assert page == (root / "docs" / "results.md").read_text(), "write it anew: make results"
    plots = {line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    assert plots == {str(one.relative_to(root / "docs")) for one in (root / "docs" / "plots").iterdir()}


def test_several_studies_on_one_page(tmp_path):
    one = made({"a": {0: answered(drawn(0.8, 0))}, "b": {0: answered(drawn(0.5, 1))}})
    other = one.model_copy(update={"name": "other", "title": "Less data", "about": "Does it take all rows?"})
    text = study_page.write([one, other], tmp_path / "results.md").read_text()
    assert [line for line in text.splitlines() if line.startswith(("# ", "## "))] == [
        "# Results",
        "## made",
        "## Less data",
    ]
    assert "Does it take all rows?" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["made-01-a-b.png", "other-01-a-b.png"]
    with pytest.raises(UserError, match="two studies are named 'made'"):
        study_page.write([one, one], tmp_path / "results.md")


@pytest.fixture
def settings(teacher, ads):
    """Two arms, one that fails and two untrained controls over a base of two rounds."""
    lossless = {"name": "lossless", "rounds": [{"drop": ["unused_tokens"]}]}
    inner = {"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}, "criterion": "magnitude", "train": {"steps": 2}}]}
    few = {"calibration_rows": 10, "validation_rows": 10, "test_rows": 20}
    return {
        "model": str(teacher),
        "data": str(ads),
        "base": {"stages": [lossless, inner], "data": few},
        "seeds": [4],
        "arms": {
            "plain": {"description": "no repair", "rounds": {"repair": []}},
            "broken": {"train": {"accumulate": 3}},
            "scratch": {"kind": "scratch", "like": "base"},
            "init": {"kind": "random-init", "like": "base"},
        },
        "groups": [{"title": "All", "arms": ["base", "plain", "broken", "scratch", "init"], "reference": "base"}],
    }


def test_a_study_killed_inside_an_arm_and_between_arms_runs_nothing_twice(
    settings, tmp_path, monkeypatch, capsys, request
):
    started, real = [], pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda *a, **k: (started.append(a[2].parent.name), real(*a, **k))[1])
    planned, out = study.plan(studies.parse(settings, "s")), tmp_path / "out"
    for text in ("round 2/2", "arm 2 of 5: plain"):
        heard = Recorder(stop_at=text)
        with pytest.raises(KeyboardInterrupt):
            study.run(planned, out, tell=heard)
    assert "round 1/2 lossless.1 was done" in heard.said
    assert started == ["base", "base"]

    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(settings))
    code, told, _ = call(monkeypatch, capsys, "study", path, "--out", out, "--json", "--quiet")
    assert code == 0
    assert started[2:] == ["plain", "broken"]
    found = sr.StudyResults.model_validate_json(told)
    arms = {arm.name: arm for arm in found.arms}
    assert "must be a multiple of train.accumulate=3" in arms["broken"].failures[4]
    assert not (out / "beginnings").exists(), "an arm that failed is not to come"
    assert {name for name, arm in arms.items() if arm.runs} == {"base", "plain", "scratch", "init"}
    for name in ("scratch", "init"):
        assert arms[name].runs[0].parameters == arms["base"].runs[0].parameters == arms["base"].planned_parameters
        assert arms[name].runs[0].row_visits == arms["base"].planned_row_visits
    assert found.environment.git is None
    told = {"model": found.model_fingerprint, "data": found.data_fingerprint}
    assert told.items() <= planned.identity.items()
    assert set(found.groups[0].differences) == {"plain", "scratch", "init"}
    assert not any(out.glob("runs/*/seed-4/cache"))
    assert len(list((out / "cache").glob("answers-*.json"))) == 2
    page = (out / "README.md").read_bytes()
    assert b"`broken`, seed 4, failed" in page

    assert call(monkeypatch, capsys, "study", out, "--page", tmp_path / "docs" / "results.md")[0] == 0
    assert (tmp_path / "docs" / "results.md").read_bytes() == page
    study.run(planned, out, only=["plain", "init"], tell=(again := Recorder()))
    assert len(started) == 4
    assert sum("was done" in text for text in again.said) == 3

    # another recipe under the name of a finished arm: refused, and its old figures are not shown
    settings["arms"]["plain"]["rounds"] = {"criterion": "random"}
    changed = study.run(study.plan(studies.parse(settings, "s")), out, only=["plain"])
    assert "belongs to another run (recipe" in changed.arms[1].failures[4]
    assert changed.arms[1].runs == ()
    assert changed.arms[0].runs


def test_a_study_of_other_data_or_another_recipe_is_not_mixed_in(settings, tmp_path):
    planned = study.plan(studies.parse(settings, "s"))
    folder = sr.folder_of(tmp_path / "out", "plain", 4)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"model": "x", "data": "y", "recipe": "z"}))
    (tmp_path / "out" / "run.json").write_text(json.dumps(planned.identity))
    found = study.run(planned, tmp_path / "out", only=["plain"])
    assert "belongs to another run" in found.arms[1].failures[4]
    written = studies.read(tmp_path / "out" / "study.yaml")
    assert written == planned.study
    assert written.base.model_fields_set == planned.study.base.model_fields_set, (
        "a default that is said means another thing"
    )
    (tmp_path / "out" / "run.json").write_text(json.dumps({**planned.identity, "data": "other"}))
    with pytest.raises(UserError, match="belongs to another run"):
        study.run(planned, tmp_path / "out")


def test_a_base_that_asks_in_vain_is_refused_and_an_arm_that_does_is_told(settings):
    settings["arms"]["plain"] = {"recipe": {"patience": 3}}
    planned = study.plan(studies.parse(settings, "s"))
    assert "patience: 3 has no effect where there is no max_drop" in planned.arms["plain"].reason
    settings["base"]["shrink"] = 4
    with pytest.raises(UserError, match=r"base: shrink: 4.0 has no effect where stages are listed"):
        study.plan(studies.parse(settings, "s"))


@pytest.mark.parametrize("drop", [["dead_blocks"], ["unused_tokens"], ["dead_blocks", "unused_tokens"]])
def test_the_planned_shape_is_that_of_the_lossless_cuts_that_are_named(drop, settings, ads, tmp_path):
    checkpoint.save(*tiny("llava-clip-llama"), tmp_path / "teacher")
    settings["model"] = str(tmp_path / "teacher")
    inner = {"sizes": {"text.ffn": 32}, "criterion": "magnitude", "repair": []}
    stages = [{"name": "lossless", "rounds": [{"drop": drop}]}, {"name": "inner", "rounds": [inner]}]
    settings["base"]["stages"] = stages
    arm = study.plan(studies.parse(settings, "s")).arms["base"]
    made = pipeline.run(
        tmp_path / "teacher", ads, tmp_path / "run", recipe.parse({**settings["base"], "bench_calls": 0}, "r")
    )
    assert (arm.sizes, arm.planned_parameters) == (made.student.sizes, made.student.parameters["total"])


def test_sizes_are_chosen_once_and_never_by_a_dry_run(settings, tmp_path, monkeypatch, capsys):
    search = {"sizes_by": "search", "search_candidates": 2, "search_row_visits": 20, "curve_rows": 8}
    few = settings["base"]["data"]
    settings["base"] = {"shrink": 1.2, "row_visits": 400, "order": ["inner"], "data": few, **search}
    settings["arms"], settings["groups"] = {"a": {"train": {"learning_rate": 1e-4}}}, []
    trained, real = [], rounds.train
    monkeypatch.setattr(rounds, "train", lambda *a, **k: (trained.append(1), real(*a, **k))[1])
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    path.write_text(json.dumps(settings))

    def dry():
        code, told, err = call(monkeypatch, capsys, "study", path, "--out", out, "--dry-run", "--json", "--quiet")
        assert code == 0, err
        return json.loads(told)["arms"][0]

    assert (dry()["chosen"], dry()["parameters"], dry()["skipped"], trained, out.exists()) == (
        False,
        None,
        None,
        [],
        False,
    )
    asked = studies.parse(settings, "s")
    with pytest.raises(KeyboardInterrupt):
        study.plan(asked, out=out, tell=Recorder(stop_at="candidate 2/2"))
    made = len(trained)
    planned = study.plan(asked, out=out)
    assert len(trained) == made > 0, "both shapes were recovered before"
    assert study.plan(asked, out=out).recipes == planned.recipes
    assert len(trained) == made
    told = dry()
    assert (told["chosen"], told["sizes"]) == (True, planned.arms["a"].sizes)
    assert {one.name for one in out.iterdir()} == {"run.json", ".lock", "sizes"}


def test_dry_run_and_missing_pieces_by_the_command_line(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(settings))
    code, told, _ = call(monkeypatch, capsys, "study", path, "--dry-run", "--json", "--quiet")
    assert code == 0
    base = next(arm for arm in json.loads(told)["arms"] if arm["name"] == "base")
    assert base["sizes"]["text.ffn"] == 32
    assert base["rounds"] == ["lossless.1: unused_tokens", "inner.1: text.ffn=32"]
    assert base["row_visits"] == 240
    code, told, _ = call(
        monkeypatch, capsys, "study", path, "--arms", "scratch", "plain", "--dry-run", "--json", "--quiet"
    )
    assert code == 0
    assert [arm["name"] for arm in json.loads(told)["arms"]] == ["base", "plain", "scratch"]
    code, _, err = call(monkeypatch, capsys, "study", path, "more")
    assert code == 2
    assert "arms come after --arms" in err
    code, _, err = call(monkeypatch, capsys, "study", path)
    assert code == 2
    assert "--out DIR" in err
    code, _, err = call(monkeypatch, capsys, "study", tmp_path, "--page", tmp_path / "p.md")
    assert code == 2
    assert "study.json: No such file" in err
