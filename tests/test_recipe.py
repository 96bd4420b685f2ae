from pathlib import Path

import pytest
import yaml

from slimlmm import recipe
from slimlmm.demo import BUNDLE
from slimlmm.errors import UserError


def test_all_problems_at_once_with_paths_and_the_nearest_key():
    raw = {
        "shrnk": 18,
        "seed": -1,
        "stages": [{"name": "a", "rounds": [{"sizes": {}, "train": {"steps": 0, "learnin_rate": 1}}]}],
    }
    with pytest.raises(UserError) as caught:
        recipe.parse(raw, "r.yaml")
    text = str(caught.value)
    assert "4 problem(s)" in text
    for part in (
        "shrnk: unknown key. Did you mean 'shrink'",
        "seed:",
        "stages.0.rounds.0.train.0.steps",
        "'learning_rate'",
    ):
        assert part in text


def test_dump_and_parse_round_trip():
    one = recipe.Recipe(shrink=4.0, stages=(recipe.Stage(name="x", rounds=(recipe.Round(sizes={"text.ffn": 8}),)),))
    assert recipe.parse(yaml.safe_load(recipe.dump(one)), "again") == one


@pytest.mark.parametrize("train", [{"steps": 3}, [{"steps": 3}]])
def test_one_training_needs_no_list(train):
    raw = {"stages": [{"name": "a", "rounds": [{"train": train}, {"train": None}]}]}
    rounds = recipe.parse(raw, "r.yaml").stages[0].rounds
    assert [[one.steps for one in turn.train] for turn in rounds] == [[3], []]


def test_yaml_that_is_none_is_one_message(tmp_path):
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        recipe.read(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="cannot read"):
        recipe.read(tmp_path / "none.yaml")


def test_yaml_cannot_build_objects(tmp_path):
    (tmp_path / "r.yaml").write_text("seed: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not valid YAML"):
        recipe.read(tmp_path / "r.yaml")


@pytest.mark.parametrize("path", sorted(BUNDLE.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path):
    recipe.read(path)


def test_the_page_of_recipes_is_current():
    page = Path(__file__).parent.parent / "docs" / "recipes.md"
    assert page.read_text() == recipe.page(), "run python -m slimlmm.recipe docs/recipes.md"


def test_a_schedule_that_is_written_out_asks_for_nothing_in_vain_and_is_read_again():
    asked = recipe.Recipe(shrink=4.0, order=("width",), row_visits=9, max_drop=1.0, patience=3)
    assert asked.unheard() == []
    whole = asked.resolved((recipe.Stage(name="x", rounds=(recipe.Round(sizes={"text.ffn": 8}),)),))
    assert recipe.parse(yaml.safe_load(recipe.dump(whole)), "again").unheard() == []
    assert (whole.max_drop, whole.patience) == (1.0, 3)
    both = recipe.parse(yaml.safe_load(recipe.dump(asked.model_copy(update={"stages": whole.stages}))), "old run")
    assert [one.partition(":")[0] for one in both.unheard()] == ["shrink", "order", "row_visits"]


@pytest.mark.parametrize("order", [["inner", "inner", "width"], []])
def test_an_order_that_names_a_level_twice_or_none_is_refused(order):
    with pytest.raises(UserError, match="blocks, inner and width, each once"):
        recipe.parse({"shrink": 18, "order": order}, "r.yaml")


def test_settings_of_a_training_without_what_they_are_for_are_in_vain():
    train = {"steps": 2, "own_temperature": 0.7, "stop_after": 9, "temperature": 2.0, "losses": {"cross_entropy": 1.0}}
    stages = [{"name": "inner", "rounds": [{"sizes": {"text.ffn": 8}, "train": train}]}]
    told = recipe.parse({"stages": stages}, "r.yaml").unheard()
    assert [one.partition(":")[0] for one in told] == [
        f"stages.inner.rounds.0.train.0.{name}" for name in ("own_temperature", "stop_after", "temperature")
    ]
    heard = train | {"losses": {"forward_kl": 1.0}, "validate_every": 1, "own_answers": 0.5}
    stages[0]["rounds"][0]["train"] = heard
    assert recipe.parse({"stages": stages}, "r.yaml").unheard() == []


def test_what_our_own_checks_find_is_told_in_their_words_alone():
    with pytest.raises(UserError) as told:
        recipe.parse(
            {"stages": [{"name": "one", "rounds": [{"sizes": {"text.width": 9}, "fade": 3, "train": {"steps": 9}}]}]},
            "r.yaml",
        )
    assert "r.yaml: 1 problem(s)\n  stages.0.rounds.0: fade=3: text.width cannot fade" in str(told.value)
    assert "Value error" not in str(told.value)
    assert "(got" not in str(told.value)
