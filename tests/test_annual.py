"""A year of two deployments: figures worked out by hand, laws that hold for any, and the arithmetic of the paper."""

import datetime
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from slimlmm import antgmm, spdx
from slimlmm.annual import KWH, YEAR, Boundaries, Compression, Deployment, Setting, annualise
from slimlmm.errors import UserError

NAMES = tuple(Boundaries.model_fields)
BEFORE = Deployment(name="teacher", joules=3600.0, seconds=0.5)
AFTER = Deployment(name="student", joules=360.0, seconds=0.1)
#: a million requests a year; devices are on twice as long as they answer and take 36 W while they do not
SHARED = Setting(requests=1e6, idle_watts=36, idle_share=0.5, server_factor=2, pue=1.5, grid=500)


def values(one):
    return [getattr(one, name) for name in NAMES]


def test_a_year_worked_out_by_hand():
    run = Compression(joules=904 * KWH)
    found = annualise(SHARED, BEFORE, AFTER, run)
    # 1e6 x 3600 J = 1000 kWh; answering 5e5 s, on 1e6 s, idle 5e5 s x 36 W = 5 kWh; x 2; x 1.5
    assert values(found.year_before.kwh) == pytest.approx([1005, 2010, 3015])
    assert found.year_before.idle_kwh == pytest.approx(5)
    assert found.year_before.idle_share == pytest.approx(0.5)
    assert found.year_before.devices == pytest.approx(1e6 / 31_536_000)
    # 1e6 x 360 J = 100 kWh; answering 1e5 s, idle 1e5 s x 36 W = 1 kWh
    assert values(found.year_after.kwh) == pytest.approx([101, 202, 303])
    assert values(found.year_after.joules) == pytest.approx([363.6, 727.2, 1090.8])
    assert values(found.saved_kwh) == pytest.approx([904, 1808, 2712])
    assert values(found.saved_co2_kg) == pytest.approx([452, 904, 1356])
    assert values(found.break_even_requests) == pytest.approx([1e6] * 3)
    assert values(found.saved_kwh_se) == [None] * 3


def test_watts_of_the_rest_of_the_server_count_while_it_is_on():
    shared = SHARED.model_copy(update={"server_factor": None, "server_watts": 72.0})
    found = annualise(shared, BEFORE, AFTER, Compression(joules=36 * KWH, seconds=3600.0 * 10))
    # on 1e6 s x 72 W = 20 kWh, on 2e5 s x 72 W = 4 kWh
    assert values(found.year_before.kwh) == pytest.approx([1005, 1025, 1537.5])
    assert values(found.year_after.kwh) == pytest.approx([101, 105, 157.5])
    # 10 h x 72 W = 0.72 kWh beside the 36
    assert values(found.break_even_requests) == pytest.approx(
        [36 / 904e-6, 36.72 / 920e-6, 1.5 * 36.72 / (1.5 * 920e-6)]
    )
    found = annualise(shared, BEFORE, AFTER, Compression(joules=36 * KWH))
    assert values(found.break_even_requests) == [pytest.approx(36 / 904e-6), None, None]


def test_devices_that_are_on_all_year_idle_when_nobody_asks():
    two = BEFORE.model_copy(update={"devices": 2.0})
    one = AFTER.model_copy(update={"devices": 1.0})
    found = annualise(Setting(requests=1e6, idle_watts=10), two, one)
    assert found.year_before.idle_kwh == pytest.approx((2 * YEAR - 5e5) * 10 / KWH)
    assert found.year_before.idle_share == pytest.approx(1 - 5e5 / (2 * YEAR))
    assert found.year_after.devices == 1
    many = Setting(requests=2 * YEAR / 0.5 * 1.001)
    with pytest.raises(UserError, match=r"teacher: .* requests of 0.5 s hold 2.002 devices all year, and there are 2"):
        annualise(many, two, one)
    annualise(Setting(requests=2 * YEAR / 0.5), two, AFTER)


def test_what_was_not_given_is_null():
    found = annualise(Setting(requests=1e6), Deployment(name="a", joules=3600.0), Deployment(name="b", joules=360.0))
    assert values(found.year_before.kwh) == [1000, None, None]
    assert (found.year_before.idle_kwh, found.year_before.idle_share, found.year_before.devices) == (None, None, None)
    assert values(found.saved_kwh) == [900, None, None]
    assert values(found.saved_co2_kg) == values(found.break_even_requests) == [None] * 3
    assert values(annualise(Setting(requests=1e6, pue=1.5), BEFORE, AFTER).saved_kwh) == [900, None, None]
    assert values(annualise(Setting(requests=1e6, server_factor=1.0), BEFORE, AFTER).saved_kwh) == [900, 900, None]


def test_standard_errors_go_along():
    sides = [one.model_copy(update={"se": se}) for one, se in ((BEFORE, 30.0), (AFTER, 40.0))]
    found = annualise(SHARED, *sides)
    assert values(found.saved_kwh_se) == pytest.approx([1e6 * 50 / KWH, 2e6 * 50 / KWH, 3e6 * 50 / KWH])
    shared = SHARED.model_copy(update={"server_factor": None, "server_watts": 72.0})
    assert values(annualise(shared, *sides).saved_kwh_se) == pytest.approx([50 / 3.6, 50 / 3.6, 75 / 3.6])
    assert values(annualise(SHARED, sides[0], AFTER).saved_kwh_se) == [None] * 3


def test_a_compression_that_saves_nothing_is_never_paid_back():
    assert values(annualise(SHARED, AFTER, BEFORE, Compression(joules=1.0)).break_even_requests) == [None] * 3
    assert values(annualise(SHARED, BEFORE, BEFORE, Compression(joules=1.0)).break_even_requests) == [None] * 3


@pytest.mark.parametrize(
    ("shared", "before", "message"),
    [
        ({"server_factor": 2, "server_watts": 3}, {}, "--server-factor and --server-watts say the same thing twice"),
        ({"idle_share": 0.5}, {"devices": 1}, "--idle-share and a number of devices"),
        ({"idle_watts": 5}, {}, "--idle-watts needs to know .* of teacher it is not known"),
        ({"server_watts": 5}, {}, "--server-watts needs to know"),
        ({"idle_watts": 5, "idle_share": 0.5}, {"seconds": None}, "the seconds of a request"),
        ({}, {"basis": "declared"}, "teacher is declared and student is measured"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(shared, before, message):
    first = BEFORE.model_copy(update=before)
    second = AFTER.model_copy(update={"basis": "measured"})
    with pytest.raises(UserError, match=message):
        annualise(Setting(requests=1e6, **shared), first, second)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Setting, {"requests": 0}),
        (Setting, {"requests": math.inf}),
        (Setting, {"requests": 1, "pue": 0.99}),
        (Setting, {"requests": 1, "server_factor": 0.5}),
        (Setting, {"requests": 1, "idle_share": 1.0}),
        (Setting, {"requests": 1, "grid": -1}),
        (Setting, {"requests": 1, "surplus": 1}),
        (Deployment, {"name": "a", "joules": 0}),
        (Deployment, {"name": "a", "joules": math.nan}),
        (Compression, {"joules": -1}),
    ],
)
def test_numbers_out_of_range_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind(**wrong)


positive = st.floats(1e-3, 1e4)
settings = st.builds(
    Setting,
    requests=st.floats(1.0, 1e12),
    idle_watts=st.floats(0, 500),
    idle_share=st.floats(0, 0.95),
    server_factor=st.floats(1, 4),
    pue=st.floats(1, 3),
    grid=st.floats(0, 1500),
)
deployments = st.builds(Deployment, name=st.just("one"), joules=positive, seconds=positive)


@given(settings, deployments, deployments, positive)
def test_laws_of_a_year(shared, before, after, spent):
    run = Compression(joules=spent)
    found = annualise(shared, before, after, run)
    # where two years are equal to the last digits, what is saved is their rounding and obeys no law
    assume(abs(found.saved_kwh.device) > 1e-6 * found.year_before.kwh.device)
    kwh = values(found.year_before.kwh)
    assert kwh == sorted(kwh)  # each boundary holds the one before it
    back = annualise(shared, after, before, run)
    assert values(back.saved_kwh) == pytest.approx([-one for one in values(found.saved_kwh)])
    twice = annualise(shared.model_copy(update={"requests": 2 * shared.requests}), before, after, run)
    assert values(twice.saved_kwh) == pytest.approx([2 * one for one in values(found.saved_kwh)])
    assert values(twice.break_even_requests) == pytest.approx(values(found.break_even_requests), nan_ok=True)
    for saved, co2 in zip(values(found.saved_kwh), values(found.saved_co2_kg), strict=True):
        assert co2 == pytest.approx(saved * shared.grid / 1000)
    assert (found.break_even_requests.device is None) == (back.break_even_requests.device is not None)
    assume(found.break_even_requests.device is not None)
    paid = found.break_even_requests.device * found.saved_kwh.device * KWH / shared.requests
    assert paid == pytest.approx(spent)
    # with a server factor and a PUE, run and requests grow alike: the break-even is the same at each boundary
    assert values(found.break_even_requests) == pytest.approx([found.break_even_requests.device] * 3)


@given(settings, deployments, st.floats(1, 3))
def test_more_of_anything_that_costs_never_takes_less(shared, one, more):
    base = values(annualise(shared, one, AFTER).year_before.kwh)

    def grown(update=None, dearer=one):
        return values(annualise(shared.model_copy(update=update or {}), dearer, AFTER).year_before.kwh)

    changes = [
        grown({"requests": shared.requests * more}),
        grown({"idle_watts": shared.idle_watts * more}),
        grown({"server_factor": shared.server_factor * more}),
        grown({"pue": shared.pue * more}),
        grown({"idle_share": 1 - (1 - shared.idle_share) / more}),
        grown(dearer=one.model_copy(update={"joules": one.joules * more})),
        grown(dearer=one.model_copy(update={"seconds": one.seconds * more})),
    ]
    for changed in changes:
        assert all(new >= old * (1 - 1e-9) for new, old in zip(changed, base, strict=True))


@given(settings, deployments)
def test_an_idle_share_and_as_many_devices_are_the_same_year(shared, one):
    by_share = annualise(shared, one, one).year_before
    devices = one.model_copy(update={"devices": by_share.devices})
    by_devices = annualise(shared.model_copy(update={"idle_share": None}), devices, devices).year_before
    assert values(by_devices.kwh) == pytest.approx(values(by_share.kwh))
    assert by_devices.idle_share == pytest.approx(by_share.idle_share, abs=1e-9)


def test_the_paper_worked_out_by_hand():
    found = antgmm.arithmetic(300.0)
    # 300 W x (0.700 - 0.090) s = 183 J; 75e6 kWh x 3.6e6 J / 183 J = 1.475e12 requests
    by_symbol = {step.symbol: step for step in found.steps}
    assert by_symbol["de"].value == pytest.approx(183)
    assert found.implied_requests == pytest.approx(2.7e14 / 183)
    assert by_symbol["N/365"].value == pytest.approx(4.0422e9, rel=1e-4)
    assert by_symbol["M"].value == pytest.approx(8.5616, rel=1e-4)
    assert by_symbol["D0"].value == pytest.approx(32_749, rel=1e-4)
    assert by_symbol["E0"].value == pytest.approx(75e6 * 0.7 / 0.61)
    assert found.reproduced_kwh == pytest.approx(75e6)
    assert {step.symbol for step in found.steps if step.mark == "published"} == {"S", "t0", "t1"}
    assert {step.symbol for step in found.steps if step.mark == "assumed"} == {"P", "k", "b"}


@given(st.floats(50, 2000), st.floats(1, 5), st.floats(1e6, 1e13))
def test_the_paper_comes_back_under_any_assumption(watts, overhead, requests):
    found = antgmm.arithmetic(watts, overhead=overhead, requests=requests)
    assert found.reproduced_kwh == pytest.approx(antgmm.SAVED_KWH)
    assert found.steps[-1].value == pytest.approx(antgmm.SAVED_KWH * requests / found.implied_requests)
    assert found.implied_requests * watts * overhead == pytest.approx(antgmm.arithmetic(1.0).implied_requests)


def test_assumptions_out_of_range_are_refused():
    for wrong in ({"watts": 0.0}, {"watts": math.inf}, {"watts": 1.0, "requests": -1.0}):
        with pytest.raises(UserError, match="give a number above 0"):
            antgmm.arithmetic(**wrong)
    with pytest.raises(UserError, match="cannot be below 1"):
        antgmm.arithmetic(300.0, overhead=0.5)


def test_spdx_tells_energy_by_the_names_of_its_ai_profile():
    when = datetime.datetime(2026, 11, 28, 13, 0, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    found = spdx.document(annualise(SHARED, BEFORE, AFTER, Compression(joules=2 * KWH)), when)
    assert found["@context"] == "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
    by_type = {one["type"]: one for one in found["@graph"]}
    package = by_type["ai_AIPackage"]
    assert package["ai_energyConsumption"] == {
        "type": "ai_EnergyConsumption",
        "ai_inferenceEnergyConsumption": [
            {
                "type": "ai_EnergyConsumptionDescription",
                "ai_energyQuantity": "0.0001",
                "ai_energyUnit": "kilowattHour",
            }
        ],
        "ai_finetuningEnergyConsumption": [
            {"type": "ai_EnergyConsumptionDescription", "ai_energyQuantity": "2", "ai_energyUnit": "kilowattHour"}
        ],
    }
    assert "of the device for one request, stated (command line)" in package["comment"]
    assert by_type["CreationInfo"]["created"] == "2026-11-28T12:00:00Z"
    assert by_type["CreationInfo"]["createdBy"] == [by_type["SoftwareAgent"]["spdxId"]]
    assert by_type["SpdxDocument"]["rootElement"] == [package["spdxId"]]


@given(st.floats(1e-6, 1e6))
def test_spdx_quantities_are_decimals_without_exponent(joules):
    one = AFTER.model_copy(update={"joules": joules})
    graph = spdx.document(annualise(SHARED, BEFORE, one), datetime.datetime.now(datetime.UTC))["@graph"]
    consumption = graph[2]["ai_energyConsumption"]
    quantity = consumption["ai_inferenceEnergyConsumption"][0]["ai_energyQuantity"]
    assert set(quantity) <= set("0123456789.")
    assert float(quantity) == pytest.approx(joules / KWH, rel=1e-5)
    assert "ai_finetuningEnergyConsumption" not in consumption
