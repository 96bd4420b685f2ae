"""The verb `energy` and `bench --energy`: from the command line to JSON, tables and refusals."""

import json

import pytest
from rich.console import Console

from slimlmm import commands, energy
from test_cli import call


@pytest.fixture
def bench_file(tmp_path):
    """A file as `bench --energy --json` writes it, with two models; change it by keyword."""

    def write(name="bench.json", **changes):
        def figure(joules, basis):
            return {"basis": basis, "source": "a counter", "joules": joules, "sd": joules / 10, "low": 0.9 * joules,
                    "high": 1.1 * joules, "n": 4, "seconds": joules / 100}  # fmt: skip

        def turns(basis):
            return [
                {"batch_size": 1, "first": figure(20.0, basis), "second": figure(180.0, basis), "ratio": 1 / 9},
                {"batch_size": 32, "first": figure(2.0, basis), "second": None, "ratio": None},
            ]

        told = {"measured": turns("measured"), "reason": None, "declared": turns("declared")} | changes
        path = tmp_path / name
        path.write_text(json.dumps({"models": [{"name": "final"}, {"name": "teacher"}], "energy": told}))
        return path

    return write


def test_a_year_from_the_command_line(monkeypatch, capsys, tmp_path):
    words = ("energy", "--before", 3600, "--after", 360, "--seconds-before", 0.5, "--seconds-after", 0.1)
    more = ("--requests", "1e6", "--idle-watts", 36, "--idle-share", 0.5, "--server-factor", 2, "--pue", 1.5)
    last = ("--grid", 500, "--spent-hours", 10, "--spent-watts", 300, "--spdx", tmp_path / "spdx.json")
    code, out, _ = call(monkeypatch, capsys, *words, *more, *last, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["saved_kwh"] == pytest.approx({"device": 904, "server": 1808, "building": 2712})
    assert found["saved_co2_kg"]["building"] == pytest.approx(1356)
    assert found["compression"] == {"joules": 1.08e7, "seconds": 36000, "basis": "declared"}
    assert found["break_even_requests"]["device"] == pytest.approx(3 / 904e-6)
    assert "ai_AIPackage" in (tmp_path / "spdx.json").read_text()
    code, out, _ = call(monkeypatch, capsys, *words, *more)
    assert code == 0
    assert "idle share of the time on" in out
    assert "before stated (command line)" in " ".join(out.split())


def test_a_year_from_what_bench_wrote(monkeypatch, capsys, bench_file):
    file = bench_file()
    words = ("energy", "--before", f"{file}#second", "--after", file, "--requests", "1e6", "--idle-share", 0, "--json")
    code, out, _ = call(monkeypatch, capsys, *words)
    found = json.loads(out)
    assert code == 0
    assert (found["before"]["name"], found["after"]["name"]) == ("teacher", "final")
    assert (found["before"]["joules"], found["before"]["basis"], found["before"]["seconds"]) == (180, "measured", 1.8)
    assert found["saved_kwh"]["device"] == pytest.approx(160e6 / 3.6e6)
    assert found["saved_kwh_se"]["device"] == pytest.approx(1e6 * (9**2 + 1) ** 0.5 / 3.6e6)
    declared = bench_file("declared.json", measured=None, reason="no counter")
    words = ("energy", "--before", f"{declared}#second", "--after", declared, "--requests", "1e6", "--json")
    assert json.loads(call(monkeypatch, capsys, *words)[1])["after"]["basis"] == "declared"


def test_the_paper_from_the_command_line(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "energy", "--paper", "--json")
    papers = json.loads(out)["papers"]
    assert code == 0
    assert [one["reproduced_kwh"] for one in papers] == pytest.approx([75e6, 75e6])
    assert [one["implied_requests"] for one in papers] == pytest.approx([2.7e14 / 183, 2.7e14 / 244])
    code, out, _ = call(
        monkeypatch, capsys, "energy", "--paper", "--device-watts", 350, "--requests", "1e9", "--pue", 1.2
    )
    assert code == 0
    assert "published: abstract" in out
    assert "assumed: not published" in " ".join(out.split())
    assert "1.05e+12 requests a year" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--before: say what the deployment takes"),
        (["--before", "3"], "--after: say what the deployment takes"),
        (["--before", "3", "--after", "2"], "--requests: say how many"),
        (["--before", "-3", "--after", "2", "--requests", "1"], "--before: -3.0 does not do; input should be greater"),
        (["--before", "nan", "--after", "2", "--requests", "1"], "--before: nan does not do"),
        (["--before", "3", "--after", "2", "--requests", "0"], "--requests: 0.0 does not do; input should be greater"),
        (["--before", "3", "--after", "2", "--requests", "1", "--pue", "0.5"], "--pue: 0.5 does not do"),
        (["--before", "3", "--seconds-before", "-1", "--after", "2"], "--before, --seconds: -1.0 does not do"),
        (["--before", "nowhere.json", "--after", "2"], "neither a number of joules nor a file"),
        (["--before", "TEXT", "--after", "2"], "is not JSON"),
        (["--before", "OTHER", "--after", "2"], "was not written by slimlmm bench"),
        (["--before", "NONE", "--after", "2"], "holds no energy; run bench with --energy"),
        (["--before", "NULL", "--after", "2"], "nothing was measured (no counter); bench --watts"),
        (["--before", "FILE#third", "--after", "2"], "after # say first or second"),
        (["--before", "FILE#second", "--batch", "32", "--after", "2"], "only one model was measured there"),
        (["--before", "FILE", "--batch", "7", "--after", "2"], "no figure of --batch 7; there are 1, 32"),
        (["--before", "FILE", "--after", "DECLARED", "--requests", "1"], "final is measured and final is declared"),
        (["--before", "3", "--after", "2", "--requests", "1", "--spent-hours", "2"], "belong together"),
        (["--before", "3", "--after", "2", "--requests", "1", "--spent-watts", "2"], "belong together"),
        (
            ["--before", "3", "--after", "2", "--requests", "1", "--spent-watts", "2", "--spent-joules", "2"],
            "say the same thing twice",
        ),
        (
            ["--before", "3", "--after", "2", "--requests", "1", "--spent-joules", "0"],
            "--spent-joules: 0.0 does not do",
        ),
        (["--before", "3", "--after", "2", "--requests", "1", "--spdx", "no/such/folder/x"], "--spdx no/such/folder/x"),
        (["--paper", "--before", "3", "--server-watts", "5"], "leave --before and --server-watts out"),
        (["--paper", "--grid", "400"], "--paper has its own figures: leave --grid out"),
        (["--before", "3", "--after", "2", "--device-watts", "300"], "an assumption of --paper"),
        (["--paper", "--pue", "0.5"], "server factor times PUE is 0.5: it cannot be below 1"),
        (["--paper", "--device-watts", "0"], "--device-watts 0: give a number above 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, bench_file, tmp_path, monkeypatch, capsys):
    files = {
        "FILE": str(bench_file()),
        "NULL": str(bench_file("null.json", measured=None, declared=None, reason="no counter")),
        "DECLARED": str(bench_file("declared.json", measured=None)),
    }
    for name, text in (("TEXT", "watts"), ("OTHER", "[1]"), ("NONE", '{"models": [], "energy": null}')):
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_text(text)
    filled = [
        files.get(word.partition("#")[0], word.partition("#")[0]) + "".join(word.partition("#")[1:]) for word in words
    ]
    code, _, err = call(monkeypatch, capsys, "energy", *filled)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_bench_tells_joules_a_request_measured_and_declared(teacher, ads, tmp_path, monkeypatch, capsys):
    class Rising:
        name, basis, total = "fake counter", "measured", 0.0

        def joules(self):
            self.total += 1.5
            return self.total

    monkeypatch.setattr(energy, "BENCH_SPAN", 0.0)
    monkeypatch.setattr(energy, "BATCHES", (1, 2))
    monkeypatch.setattr(energy, "found_counter", lambda device: Rising())
    words = ("bench", teacher, "--data", ads, "--calls", "1", "--against", teacher, "--json")
    code, out, _ = call(monkeypatch, capsys, *words, "--energy", "--watts", 250)
    found = json.loads(out)
    measured, declared = found["energy"]["measured"], found["energy"]["declared"]
    assert code == 0
    assert [(one["batch_size"], one["first"]["joules"]) for one in measured] == [(1, 1.5), (2, 0.75)]
    assert (measured[0]["second"]["sd"], measured[0]["ratio"], found["energy"]["reason"]) == (0, 1, None)
    assert {one[side]["basis"] for one in declared for side in ("first", "second")} == {"declared"}
    Console(width=120).print(commands.bench_table(found))
    shown = capsys.readouterr().out
    assert "J a request, batch 1, measured" in shown
    assert "J a request, batch 2, declared" in shown
    assert "standard deviation, n = 5" in shown
    found["energy"] |= {"measured": None, "reason": "no energy counter here: install x[energy]"}
    (tmp_path / "bench.json").write_text(json.dumps(found))
    side = tmp_path / "bench.json"
    code, out, _ = call(monkeypatch, capsys, "energy", "--before", f"{side}#second", "--after", side, "--requests", 1)
    assert code == 0
    assert "250 W as declared, not measured" in " ".join(out.split())
    Console(width=120).print(commands.bench_table(found))
    shown = capsys.readouterr().out
    assert "no energy counter here: install x[energy]" in shown
    assert ", measured" not in shown


def test_bench_refuses_watts_before_it_loads_anything(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "bench", "no/such/model", "--watts", 0)
    assert code == 2
    assert "--watts 0: give the watts" in err
