import json
import subprocess
import sys

import pytest

from slimlmm import checkpoint, cli
from tiny import tiny

VERBS = ("inspect", "cut", "finetune", "compress", "study", "evaluate", "bench", "adreview", "demo")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model, processor = tiny("llava-dinov2-llama")
    checkpoint.save(model, processor, folder)
    return folder


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
        (["compress", "TEACHER", "--data", "ADS", "--out", "OUT", "--shrink", "100000"], "smallest shape"),
        (["compress", "TEACHER", "--data", "ADS", "--out", "OUT"], "--shrink 18"),
        (["compress", "TEACHER", "--data", "nowhere", "--out", "OUT", "--shrink", "2"], "no such file"),
        (["evaluate", "TEACHER", "--data", "ADS", "--split", "exam"], "'exam'"),
        (["adreview", "ADS"], "not empty"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, message, teacher, ads, tmp_path, monkeypatch, capsys):
    places = {"TEACHER": teacher, "OUT": tmp_path / "out", "ADS": ads}
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
