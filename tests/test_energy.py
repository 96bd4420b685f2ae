"""Energy: joules are differences of a counter over answers, by counters that start again, stand still or are not there."""

import importlib
import itertools
import math
import statistics
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from slimlmm import budget, energy, plan
from slimlmm.budget import Stopwatch
from slimlmm.data import Row
from slimlmm.energy import Declared, Gpu, Rapl
from slimlmm.errors import UserError
from slimlmm.resizing import predict_parameters
from tiny import tiny_config

CPU = torch.device("cpu")


class Fake:
    """A counter that rises by so many joules whenever a model has answered."""

    name, basis = "fake counter", "measured"

    def __init__(self):
        self.total = 0.0

    def joules(self):
        return self.total


@pytest.fixture
def rapl(tmp_path):
    """A folder as Linux shows counters of processors, for the real CodeCarbon; write counters with `package`."""
    pytest.importorskip("codecarbon")
    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "intel-rapl" / "subsystem").symlink_to(tmp_path)
    return tmp_path


def package(root, number, value, most=1000_000_000, name="package-0"):
    parent = root / "intel-rapl"
    folder = parent / f"intel-rapl:{str(number)[0]}" if ":" in str(number) else parent
    folder = folder / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "name").write_text(f"{name}\n")


def test_a_reading_is_the_difference_over_as_many_answers_as_last_long_enough():
    counter, ticks = Fake(), count()
    clock = lambda: 0.1 * next(ticks)  # noqa: E731 - a tenth of a second passes with every look

    def answer():
        counter.total += 3.0

    found = energy.reading(counter, answer, clock)
    assert found.joules == pytest.approx(3.0)
    assert found.seconds == pytest.approx(0.1, rel=0.5)
    assert counter.total == pytest.approx(3.0 * energy.SPAN / 0.1)


def test_a_counter_that_stands_still_is_refused():
    with pytest.raises(UserError, match=r"fake counter stood still over \d+ answers"):
        energy.reading(Fake(), lambda: None, iter([0.0, 1.0, 2.0, 3.0]).__next__)


def test_real_answers_are_counted_in_turns():
    seconds = count()

    class PerLook(Fake):
        def joules(self):
            self.total += 0.25
            return self.total

    small = tiny_config("llava-dinov2-llama")
    found = energy.joules_of(PerLook(), lambda: float(next(seconds)))([small, small], CPU, 9)
    assert found == [[0.25] * energy.READINGS] * 2


def test_a_search_by_a_counter_that_stands_still_is_told_to_give_another_budget(monkeypatch):
    monkeypatch.setattr(energy, "answerer", lambda config, device: lambda: None)
    seconds = count()
    with pytest.raises(UserError, match=r"stood still .*; give another budget\."):
        energy.joules_of(Fake(), lambda: float(next(seconds)))([None], CPU, 1)


def test_packages_are_summed_and_followed_when_they_start_again(rapl):
    package(rapl, 0, 5_000_000)
    package(rapl, 1, 900_000_000, name="package-1")
    package(rapl, "0:0", 77_000_000, name="core")
    package(rapl, 2, 55_000_000, name="psys")
    counter = Rapl(rapl)
    assert counter.joules() == pytest.approx(0)
    package(rapl, 1, 100_000_000, name="package-1")
    assert counter.joules() == pytest.approx(200.0)
    package(rapl, 0, 6_000_000)
    package(rapl, "0:0", 99_000_000, name="core")
    package(rapl, 2, 95_000_000, name="psys")
    assert counter.joules() == pytest.approx(201.0)


def test_a_package_that_mirrors_another_counts_once(rapl):
    for number in (0, 1):
        package(rapl, number, 40_000_000, name=f"package-{number}")
    counter = Rapl(rapl)
    for number in (0, 1):
        package(rapl, number, 70_000_000, name=f"package-{number}")
    assert counter.joules() == pytest.approx(30.0)


def test_a_machine_without_a_counter_is_told_so(rapl, tmp_path):
    with pytest.raises(
        UserError, match=r"no energy counter on this machine: .*nowhere shows no processor package; give another"
    ):
        energy.counter_of(CPU, tmp_path / "nowhere")
    package(rapl, 0, 5)
    assert energy.counter_of(CPU, rapl).joules() == pytest.approx(0)
    file = rapl / "intel-rapl" / "intel-rapl:0" / "energy_uj"
    file.unlink()
    file.mkdir()  # as good as one that only root may read
    with pytest.raises(UserError, match=r"no energy counter on this machine: .* whose energy_uj may be read"):
        energy.counter_of(CPU, rapl)


def test_a_machine_without_the_library_is_told_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("codecarbon")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(UserError, match=r"no energy counter on this machine: .*pip install 'slimlmm\[energy\]'"):
        energy.found_counter(CPU, tmp_path)


class FakeGpu:
    """What CodeCarbon shows of a GPU: kilowatt-hours since the last look, 0.5 J each time."""

    def __init__(self, uuid, last=1.0):
        self.uuid, self.last_energy, self.energy_delta = uuid, last, SimpleNamespace(kWh=0.5 / 3.6e6)

    def get_static_details(self):
        return {"uuid": self.uuid}

    def start(self):
        pass

    def delta(self, duration):
        assert duration >= 0


def test_a_gpu_is_found_by_its_name_and_counts_when_it_has_nothing_left_to_do(monkeypatch):
    synchronized = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H200", uuid="b-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    devices = [FakeGpu("GPU-a-1"), FakeGpu("GPU-b-2")]
    parts = {
        "gpu": SimpleNamespace(AllGPUDevices=lambda: SimpleNamespace(devices=devices)),
        "units": SimpleNamespace(Time=SimpleNamespace(from_seconds=lambda seconds: seconds)),
    }
    monkeypatch.setattr(energy, "_codecarbon", parts.__getitem__)
    device = torch.device("cuda", 0)
    counter = energy.found_counter(device)
    assert isinstance(counter, Gpu)
    assert [counter.joules(), counter.joules()] == [pytest.approx(0.5), pytest.approx(1.0)]
    assert synchronized == [device] * 2
    devices[1].last_energy = None
    with pytest.raises(UserError, match="H200 does not tell its energy"):
        energy.found_counter(device)
    del devices[1]
    with pytest.raises(UserError, match="H200 is not among the 1 GPUs that NVML shows"):
        energy.found_counter(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here")
def test_a_real_gpu_tells_its_energy():
    importlib.import_module("codecarbon")
    counter = energy.found_counter(torch.device("cuda", 0))
    square = torch.randn(4096, 4096, device="cuda")
    found = energy.reading(counter, lambda: square @ square, span=2.0)
    assert 20 < found.joules / found.seconds < 2000


def test_declared_watts_are_seconds_times_watts_and_say_so():
    counter = Declared(250.0, iter([2.0, 5.0]).__next__)
    before = counter.joules()
    assert counter.joules() - before == pytest.approx(750.0)
    assert (counter.basis, counter.name) == ("declared", "250 W as declared, not measured")
    for watts in (0.0, -3.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"--watts .*: give the watts"):
            Declared(watts)


class Silent:
    """A model that only knows whether it is trained."""

    training, device = False, CPU

    def eval(self):
        pass

    def train(self, mode):
        pass


@pytest.fixture
def turns(monkeypatch):
    """Two sides whose answers are noted and let a counter rise; (sides, rows, counter, calls, clock)."""
    counter, calls, now = Fake(), [], [0.0]
    costs = {"a": itertools.cycle([6.0, 6.0, 9.0, 6.0, 6.0, 9.0]), "b": itertools.repeat(3.0)}
    sides = [SimpleNamespace(model=Silent(), processor=name) for name in "ab"]

    def answer(model, processor, rows, limit):
        calls.append((processor, [row.id for row in rows]))
        counter.total += next(costs[processor])
        now[0] += 2.5

    monkeypatch.setattr(energy, "answer", answer)
    monkeypatch.setattr(energy, "answer_limit", lambda processor, rows: 4)
    rows = [Row(str(number), b"", "?", "!", "task") for number in range(3)]
    return sides, rows, counter, calls, lambda: now[0]


def test_models_are_read_in_turns_on_the_same_rows_with_their_spread(turns):
    sides, rows, counter, calls, clock = turns
    found = energy.in_turns(sides, rows, 2, counter, clock=clock, span=2.0)
    warm, read = calls[:2], calls[2:]
    assert warm == [("a", ["0", "1"]), ("b", ["0", "1"])]
    pictures = [["0", "1"], ["2", "0"], ["1", "2"], ["0", "1"], ["2", "0"]]
    assert read == [(side, batch) for batch in pictures for side in "ab"]
    each = [3.0, 4.5, 3.0, 3.0, 4.5]
    assert found.first.joules == pytest.approx(statistics.mean(each))
    assert found.first.sd == pytest.approx(statistics.stdev(each))
    half = 2.776445 * statistics.stdev(each) / math.sqrt(5)  # Student's t, 4 degrees of freedom
    assert (found.first.low, found.first.high) == (
        pytest.approx(found.first.joules - half),
        pytest.approx(found.first.joules + half),
    )
    assert (found.first.n, found.first.seconds, found.first.basis) == (5, 1.25, "measured")
    assert found.second.joules == pytest.approx(1.5)
    assert found.ratio == pytest.approx(found.first.joules / 1.5)


def test_without_a_counter_energy_is_null_and_declared_watts_stay_apart(turns, monkeypatch):
    sides, rows, counter, _, clock = turns

    def none(device):
        raise UserError("no energy counter on this machine: there is none")

    monkeypatch.setattr(energy, "found_counter", none)
    found = energy.bench(sides, rows, clock=clock)
    assert (found.measured, found.declared) == (None, None)
    assert found.reason == "no energy counter on this machine: there is none"
    found = energy.bench(sides[:1], rows, Declared(100.0, clock), clock=clock)
    assert found.measured is None
    assert [one.batch_size for one in found.declared] == [1, 32]
    assert {one.first.basis for one in found.declared} == {"declared"}
    assert [one.first.joules for one in found.declared] == pytest.approx([250.0, 250.0 / 32])
    assert found.declared[0].second is found.declared[0].ratio is None
    monkeypatch.setattr(energy, "found_counter", lambda device: counter)
    found = energy.bench(sides, rows, Declared(100.0, clock), clock=clock)
    assert {one.first.basis for one in found.measured} == {"measured"}
    assert found.reason is None
    monkeypatch.setattr(Fake, "joules", lambda self: 1.0)
    found = energy.bench(sides, rows, clock=clock)
    assert found.measured is None
    assert "stood still" in found.reason


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
