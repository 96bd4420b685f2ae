"""Energy: joules are differences of a counter over answers, by counters that start again, stand still or are not there."""

from itertools import count

import pytest
import torch

from slimlmm import budget, energy, plan
from slimlmm.budget import Stopwatch
from slimlmm.energy import Rapl
from slimlmm.errors import UserError
from slimlmm.resizing import predict_parameters
from tiny import tiny_config

CPU = torch.device("cpu")


class Fake:
    """A counter that rises by so many joules whenever a model has answered."""

    name = "fake counter"

    def __init__(self):
        self.total = 0.0

    def joules(self):
        return self.total


def package(root, number, value, most=1000_000_000, name="package-0"):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "name").write_text(f"{name}\n")


def test_a_reading_is_the_difference_over_as_many_answers_as_last_long_enough():
    counter, ticks = Fake(), count()
    clock = lambda: 0.1 * next(ticks)  # noqa: E731 - a tenth of a second passes with every look

    def answer():
        counter.total += 3.0

    assert energy.reading(counter, answer, clock) == pytest.approx(3.0)
    assert counter.total == pytest.approx(3.0 * energy.SPAN / 0.1)


def test_a_counter_that_stands_still_is_refused():
    with pytest.raises(UserError, match=r"fake counter stood still over \d+ answers"):
        energy.reading(Fake(), lambda: None, iter([0.0, 1.0, 2.0]).__next__)


def test_real_answers_are_counted_in_turns():
    seconds = count()

    class PerLook(Fake):
        def joules(self):
            self.total += 0.25
            return self.total

    small = tiny_config("llava-dinov2-llama")
    found = energy.joules_of(PerLook(), lambda: float(next(seconds)))([small, small], CPU, 9)
    assert found == [[0.25] * energy.READINGS] * 2


def test_packages_are_summed_and_followed_when_they_start_again(tmp_path):
    package(tmp_path, 0, 5_000_000)
    package(tmp_path, 1, 900_000_000, name="package-1")
    package(tmp_path, "0:0", 77_000_000, name="core")
    package(tmp_path, 2, 55_000_000, name="psys")
    counter = Rapl(tmp_path)
    before = counter.joules()
    assert before == pytest.approx(905.0)
    package(tmp_path, 1, 100_000_000, name="package-1")
    assert counter.joules() - before == pytest.approx(200.0)
    package(tmp_path, 0, 6_000_000)
    assert counter.joules() - before == pytest.approx(201.0)


def test_a_machine_without_a_counter_is_told_so(tmp_path):
    with pytest.raises(
        UserError, match=r"no energy counter on this machine: .* shows no processor package; give another"
    ):
        energy.counter_of(CPU, tmp_path)
    package(tmp_path, 0, 5)
    assert energy.counter_of(CPU, tmp_path).joules() == pytest.approx(5e-6)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # as good as one that only root may read
    with pytest.raises(UserError, match=r"no energy counter on this machine: .*energy_uj cannot be read"):
        energy.counter_of(CPU, tmp_path)


def test_the_search_by_joules_keeps_the_budget():
    def fake(configs, device, n):
        return [[2e-6 * predict_parameters(config, {})] * n for config in configs]

    config = tiny_config("llava-dinov2-llama")
    watch = Stopwatch(device=CPU, seconds=fake, unit="J", scale=1.0)
    limit = 1.4e-6 * predict_parameters(config, {})
    space, allowed = (
        plan.space_of(config, levels=("blocks", "inner")),
        budget.by_energy(config, limit, "--energy-j 1", watch),
    )
    sizes = plan.scaled_within(space, allowed)[1]
    assert 2e-6 * predict_parameters(config, space.stated(sizes)) <= limit
    with pytest.raises(UserError, match=r"takes [\d.e-]+ J\. Ask for --energy-j") as caught:
        plan.scaled_within(space, budget.by_energy(config, 1e-9, "--energy-j 1e-9", watch))
    proposed = float(str(caught.value).split("--energy-j ")[-1].split()[0])
    plan.scaled_within(space, budget.by_energy(config, proposed, "--energy-j", watch))


@pytest.mark.parametrize(
    ("value", "up"), [(12.34, 12.4), (12.4, 12.4), (0.0521, 0.053), (0.00081239, 0.00082), (3.0, 3.0)]
)
def test_what_a_refusal_proposes_is_rounded_up(value, up):
    assert budget.upwards(value) == pytest.approx(up)
    assert float(f"{budget.upwards(value):g}") >= value * (1 - 1e-6)
