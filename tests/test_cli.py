import json
import subprocess
import sys

import pytest

from slimlmm import checkpoint, cli

VERBS = (
    *("inspect", "cut", "finetune", "compress", "plan", "study", "evaluate", "bench", "energy", "serve", "adreview"),
    *("calibrate", "monitor", "export", "check-data", "verify", "reproduce", "convert"),
    "demo",
)


def call(monkeypatch, capsys, *words):
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["slimlmm", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"slimlmm {verb}" in out


def test_inspect_reports_every_axis_as_json(teacher, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "inspect", teacher, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"text.blocks", "text.ffn", "text.width", "vision.width", "vocab"} <= {
        axis["axis"] for axis in found["axes"]
    }
    assert found["parameters"] == checkpoint.load(teacher).model.num_parameters()


def test_inspect_counts_a_cut_model_as_the_cut_itself_does(teacher, tmp_path, monkeypatch, capsys):
    words = ("--set", "text.ffn=32", "--set", "vision.blocks=2", "--json")
    code, out, _ = call(monkeypatch, capsys, "inspect", teacher, *words)
    assert code == 0
    told = json.loads(out)["after"]["parts"]["total"]
    assert call(monkeypatch, capsys, "cut", teacher, *words, "--out", tmp_path / "small")[0] == 0
    assert told == checkpoint.load(tmp_path / "small").model.num_parameters()


def test_plan_reports_json(teacher, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "plan", teacher, "--parameters", "30K", "--fix", "text.width=24", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["costs"]["parameters"]["planned"] <= 30_000
    assert {"axis": "text.width", "now": 48, "planned": 24, "kept": 0.5, "given": "--fix"} in found["axes"]


def test_cut_saves_a_plain_checkpoint(teacher, tmp_path, monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch,
        capsys,
        "cut",
        teacher,
        "--set",
        "text.ffn=32",
        "--set",
        "vision.blocks=2",
        "--out",
        tmp_path / "small",
        "--json",
    )
    assert code == 0
    small = checkpoint.load(tmp_path / "small").model
    assert small.num_parameters() == json.loads(out)["parameters"]
    assert small.config.text_config.intermediate_size == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "no/such/folder"], "no/such/folder"),
        (["cut", "TEACHER", "--set", "text.fnn=3", "--out", "OUT"], "Did you mean 'text.ffn'"),
        (["cut", "TEACHER", "--set", "text.ffn=9999", "--out", "OUT"], "the axis has 68"),
        (["cut", "TEACHER", "--set", "text.ffn", "--out", "OUT"], "not axis=size"),
        (["cut", "TEACHER", "--set", "text.ffn=32", "--out", "OUT", "--criterion", "taylr"], "taylor"),
        (["cut", "TEACHER", "--set", "text.ffn=32", "--out", "OUT", "--criterion", "taylor"], "needs --data"),
        (["cut", "TEACHER", "--set", "text.ffn=32", "--out", "OUT", "--criterion", "obs"], "chooses for a refit"),
        (["compress", "TEACHER", "--data", "ADS", "--out", "OUT", "--shrink", "100000"], "smallest shape"),
        (["compress", "TEACHER", "--data", "ADS", "--out", "OUT"], "--shrink 18"),
        (["compress", "TEACHER", "--data", "nowhere", "--out", "OUT", "--shrink", "2"], "no such file"),
        (["evaluate", "TEACHER", "--data", "ADS", "--split", "exam"], "'exam'"),
        (["adreview", "ADS"], "not empty"),
        (["plan", "TEACHER"], "exactly one budget of --shrink, --parameters"),
        (["plan", "TEACHER", "--shrink", "2", "--bytes", "1MB"], "not --shrink and --bytes"),
        (["plan", "TEACHER", "--shrink", "1"], "--shrink 1: give a number above 1"),
        (["plan", "TEACHER", "--latency-ms", "nan"], "--latency-ms nan: give a number above 0"),
        (["plan", "TEACHER", "--parameters", "3Q"], "--parameters '3Q': give a number"),
        (["plan", "TEACHER", "--bytes", "-1"], "--bytes '-1': give a number"),
        (["plan", "TEACHER", "--parameters", "1B"], "nothing has to be cut"),
        (["plan", "TEACHER", "--flops", "1T"], "nothing has to be cut"),
        (["plan", "TEACHER", "--latency-ms", "1e9"], "nothing has to be cut"),
        (["plan", "TEACHER", "--parameters", "10"], "Ask for --parameters"),
        (["plan", "TEACHER", "--bytes", "1KB"], "Ask for --bytes"),
        (["plan", "TEACHER", "--flops", "1"], "Ask for --flops"),
        (["plan", "TEACHER", "--latency-ms", "0.001"], "smallest shape that the axes of 'llava' allow takes"),
        (["plan", "TEACHER", "--shrink", "2", "--fix", "text.ffn"], "--fix:\n  'text.ffn' is not axis=size"),
        (["plan", "TEACHER", "--shrink", "2", "--floor", "text.fnn=3"], "Did you mean 'text.ffn'"),
        (["plan", "TEACHER", "--shrink", "2", "--data", "nowhere"], "no such file"),
        (["plan", "TEACHER", "--shrink", "2", "--recipe", "nowhere"], "cannot read the recipe"),
        (["plan", "TEACHER", "--recipe", "STAGES"], "lists stages, so there is nothing to plan"),
        (["plan", "TEACHER", "--shrink", "2", "--out", "STAGES"], "exists; give a file that does not"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, teacher, ads, tmp_path, monkeypatch, capsys):
    places = {"TEACHER": teacher, "OUT": tmp_path / "out", "ADS": ads, "STAGES": tmp_path / "stages.yaml"}
    places["STAGES"].write_text("stages: [{name: inner, rounds: [{sizes: {text.ffn: 32}}]}]")
    code, _, err = call(monkeypatch, capsys, *[places.get(word, word) for word in words])
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(teacher, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((teacher / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = call(monkeypatch, capsys, "evaluate", folder, "--data", tmp_path)
    assert code == 2
    assert "pickled" in err


def test_evaluate_finetune_and_bench_report_json(teacher, ads, tmp_path, monkeypatch, capsys):
    code, out, _ = call(
        monkeypatch, capsys, "evaluate", teacher, "--data", ads, "--json", "--quiet", "--against", teacher
    )
    found = json.loads(out)
    assert code == 0
    assert found["overall"]["n"] == 40
    assert found["effect"]["drop"]["mean"] == 0
    code, out, _ = call(
        monkeypatch,
        capsys,
        "finetune",
        teacher,
        "--data",
        ads,
        "--out",
        tmp_path / "tuned",
        "--epochs",
        "1",
        "--json",
        "--quiet",
    )
    assert code == 0
    assert json.loads(out)["row_visits"] > 0
    code, out, _ = call(
        monkeypatch, capsys, "bench", tmp_path / "tuned", "--against", teacher, "--calls", "2", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["models"]) == 2


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "slimlmm", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "compress" in done.stdout
