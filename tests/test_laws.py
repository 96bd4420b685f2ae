"""The laws of cutting, for every axis that `describe` finds: a twelfth of the families here, all of them in `make conformance`.

cut == masked and predicted == counted, with saving, loading and generating, are `test_conformance.py` and docs/families.md.
"""

import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

import laws
from slimlmm import backbones, families
from slimlmm.anatomy import describe
from slimlmm.prompts import picture_prompt
from zoo import CONFIGS
from zoo.others import STAND_IN
from zoo.random_configs import configurations

#: pairs of axes per family whose cuts are tried in both orders: here, and in `make conformance`
PAIRS, ALL_PAIRS = 1, 3


def test_keep_all_is_the_identity_units_have_no_order_and_cuts_commute(sampled_family, request):
    """One test for three laws, because building and describing the model takes as long as one of them."""
    found = laws.ready(CONFIGS[sampled_family]())
    axes = [axis for axis in found.axes() if is_its_own(sampled_family, axis.name)]
    wrong = []
    for axis in axes:
        wrong += [(axis.name, said) for said in [laws.keep_all_is_the_identity(found, axis)] if said]
        wrong += [(axis.name, said) for said in [laws.permuting_permutes_the_choice(found, axis)] if said]
    pairs = list(itertools.combinations(axes, 2))
    random.Random(sampled_family).shuffle(pairs)
    compared, wanted = 0, ALL_PAIRS if request.config.getoption("--whole-grid") else PAIRS
    for first, second in pairs:
        said = laws.cuts_commute(found, first, second) if compared < wanted else None
        compared += said is not None
        wrong += [(first.name, second.name, said)] if said else []
    assert not wrong
    assert compared == min(wanted, len(pairs)), "too few pairs could be compared"


def is_its_own(family: str, axis: str) -> bool:
    """Tell whether a part of the model is the real one: a family of `STAND_IN` has another vision tower here."""
    return family not in STAND_IN or not axis.startswith("vision.")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_describes_itself_and_one_axis_is_proven(family):
    """The axis is drawn by the family's name, so that all kinds of axes have their turn."""
    config = CONFIGS[family]()
    anatomy = describe(config)
    axes = [axis for axis in anatomy.axes.values() if not axis.refusal and laws.smaller(axis)]
    rng = random.Random(family)
    axis = rng.choice([axis for axis in axes if is_its_own(family, axis.name)])
    model, batch = laws.random_model(config), picture_prompt(config)
    tries = (laws.outcome(model, anatomy, axis, batch, None, rng) for _ in range(5))
    found = next((outcome for outcome in tries if outcome.verdict != "vacuous"), None)
    assert found is not None, "each choice changed nothing"
    assert found.verdict in ("proven", "rounding"), found


drawn = []


@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(configurations())
def test_any_axis_of_any_random_configuration_cuts_as_it_masks_or_is_refused(found):
    """`benchmarks/properties.py` does the same over a thousand of them."""
    name, config = found
    try:
        outcomes = list(laws.outcomes(config, seed=len(drawn)))
    except laws.NoModelError:
        assume(False)
    drawn.append(name)
    broken = [outcome for outcome in outcomes if outcome.verdict == "broken"]
    assert not broken, (name, broken)
    assert all(outcome.reason for outcome in outcomes if outcome.verdict == "refused")


def test_the_laws_notice_query_norms_kept_by_the_wrong_rows(monkeypatch):
    """As Cohere was described before random configurations found it: double precision must not excuse it."""
    wrong = dataclasses.replace(backbones.BACKBONES["cohere"], layouts={})
    monkeypatch.setattr(families, "BACKBONES", {**backbones.BACKBONES, "cohere": wrong})
    monkeypatch.setattr("slimlmm.anatomy._ANATOMIES", {})
    found = laws.ready(CONFIGS["llava-cohere"]())
    axis = found.anatomy.axis("text.kv_groups")
    outcome = laws.outcome(found.model, found.anatomy, axis, found.batch, found.before, random.Random(0))
    assert outcome.verdict == "broken"
    assert "another function" in laws.permuting_permutes_the_choice(found, axis)
    monkeypatch.undo()
