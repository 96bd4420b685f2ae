"""The verb: views, page, metrics with dashboard and rules, settings, and what it says where there is nothing to tell."""

import io
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from importlib import resources

import pytest
import yaml
from rich.console import Console

import test_cli
from monitored import BEGIN, answer, drawn, fill, pair
from slimlmm.errors import UserError
from slimlmm.monitoring import metrics, page, tables, verb
from slimlmm.monitoring.monitor import Shown, monitor
from slimlmm.monitoring.settings import Monitoring, read
from slimlmm.serving.metrics import Metrics
from slimlmm.serving.serve import free_port
from slimlmm.serving.store import ANSWERS, EVENTS, PAIRS, opened

SETTINGS = "reference_days: 10\nrecent_days: 3\nevery: 3000\n"
CONFIG = Monitoring(reference_days=10, recent_days=3, every=3000)


def call(monkeypatch, capsys, *words):
    """Run the verb in this process; return (exit code, stdout, stderr)."""
    return test_cli.call(monkeypatch, capsys, "monitor", *words)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitored")
    change = {"disagree": lambda day: 0.05 if day < 20 else 0.35, "bright": lambda day: 120 if day < 20 else 170}
    database = opened(str(folder / "store.sqlite"))
    fill(database, drawn(30, 200, **change))
    database.dispose()
    (folder / "monitor.yaml").write_text(SETTINGS)
    return folder / "store.sqlite"


@pytest.fixture(scope="module")
def found(path):
    database = opened(str(path))
    yield monitor(database, CONFIG, Shown())
    database.dispose()


def test_json_holds_what_was_found(path, found, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, path, "--json", "--config", path.with_name("monitor.yaml"))
    assert code == 0
    told = json.loads(out)
    assert told == found.model_dump(mode="json")
    assert told["total"]["requests"] == 6000
    assert len(told["days"]) == 30
    assert any(ring["watch"] == "agreement" for watch in told["watches"] for ring in watch["rings"])


def test_the_terminal_says_it_in_80_characters(found):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.terminal(found), highlight=False)
    text = console.export_text()
    assert "agreement" in text
    assert "last 14 days" in text
    assert tables.verdict(found) in " ".join(text.split())
    assert "energy by rapl: 2 J a request of 6,000" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text, "no cell is cut"


def test_days_can_be_chosen(path, monkeypatch, capsys):
    words = ("--json", "--config", path.with_name("monitor.yaml"))
    told = json.loads(call(monkeypatch, capsys, path, "--days", 2, *words)[1])
    assert [one["day"] for one in told["days"]] == ["2026-01-29", "2026-01-30"]
    told = json.loads(call(monkeypatch, capsys, path, "--since", "2026-01-03", "--until", "2026-01-04", *words)[1])
    assert (told["since"], told["until"], told["total"]["requests"]) == ("2026-01-03", "2026-01-04", 400)
    code, _, err = call(monkeypatch, capsys, path, "--since", "2027-01-01")
    assert code == 2
    assert "2026-01-01 to 2026-01-30" in err


def test_write_keeps_alarms_once(path, found, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(path.read_bytes())
    for _ in range(2):
        code, _, _ = call(monkeypatch, capsys, copy, "--write", "--config", path.with_name("monitor.yaml"))
        assert code == 0
    database = opened(str(copy))
    with database.connect() as connection:
        kinds = [row.kind for row in connection.execute(EVENTS.select())]
    assert kinds.count("alarm") == len(found.rings)
    assert kinds.count("reference") == 1
    database.dispose()


def test_the_page_is_one_file_that_escapes_what_callers_said(tmp_path):
    database = opened(str(tmp_path / "store.sqlite"))
    task = "<script>alert('$x$')</script>"
    answers = [answer(str(n), BEGIN + n * 300, task=(task, "b")[n % 2]) for n in range(900)]
    pairs = [pair(str(n), BEGIN + n * 300, agree=True, task=(task, "b")[n % 2]) for n in range(900)]
    fill(database, {ANSWERS: answers, PAIRS: pairs})
    out = page.write(monitor(database, Monitoring(), Shown()), tmp_path / "page.html")
    text = out.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "nothing is loaded from elsewhere"
    assert text.count("data:image/svg+xml;base64,") >= 4
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".part"] == []


def test_the_page_shows_alarms_and_the_same_record_gives_the_same_bytes(found, tmp_path):
    first, second = (page.write(found, tmp_path / name).read_text() for name in ("a.html", "b.html"))
    assert first == second
    assert 'class="verdict alarm"' in first
    assert "picture brightness" in first
    assert "joules a request" in first


def test_a_page_of_one_day(tmp_path):
    database = opened(str(tmp_path / "store.sqlite"))
    fill(database, {ANSWERS: [answer("1", BEGIN + 5, status=503, answer=None, confidence=None)]})
    text = page.write(monitor(database, Monitoring(), Shown()), tmp_path / "page.html").read_text()
    assert "100.00" in text
    assert "no shadow pair" in text


def names_in(text):
    return set(re.findall(r"slimlmm_[a-z0-9_]+", text))


def known(found):
    """Return the names of all series of the gateway and of the monitor."""
    gauges = metrics.registry_of(metrics.Gauges(found)).collect()
    gateway = Metrics()
    for name in ("slimlmm_inside", "slimlmm_waiting", "slimlmm_store_failed"):
        gateway.watch(name, "a gauge of the gateway", lambda: 0.0)
    series = set()
    for metric in (*gauges, *gateway.registry.collect()):
        if metric.type == "counter":
            series.add(f"{metric.name}_total")
        elif metric.type == "histogram":
            series |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            series.add(metric.name)
    return series


def test_gauges_of_the_gateway_that_are_named_here_are_its_own():
    from pathlib import Path

    import slimlmm.serving.gateway as gateway

    source = Path(gateway.__file__).read_text()
    assert all(f'"{name}"' in source for name in ("slimlmm_inside", "slimlmm_waiting", "slimlmm_store_failed"))


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yaml"])
def test_every_metric_of_dashboard_and_rules_exists(name, found):
    text = (resources.files("slimlmm") / "templates" / name).read_text()
    used = names_in(text)
    assert len(used) > 8
    assert used <= known(found), used - known(found)


def test_dashboard_and_rules_are_whole():
    folder = resources.files("slimlmm") / "templates"
    board = json.loads((folder / "grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    taken = [
        (x, y)
        for one in places
        for x in range(one["x"], one["x"] + one["w"])
        for y in range(one["y"], one["y"] + one["h"])
    ]
    assert len(taken) == len(set(taken)), "no panel lies over another"
    assert max(x for x, _ in taken) < 24
    assert all(target["expr"] for panel in board["panels"] for target in panel["targets"])
    groups = yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= set(rule) for rule in rules)
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in rules)


def test_a_text_file_of_metrics_says_what_was_found(path, found, tmp_path, monkeypatch, capsys):
    out = tmp_path / "slimlmm.prom"
    words = ("--prometheus", out, "--config", path.with_name("monitor.yaml"))
    assert call(monkeypatch, capsys, path, *words)[0] == 0
    lines = dict(line.rsplit(" ", 1) for line in out.read_text().splitlines() if not line.startswith("#"))
    agreement = found.total.agreement
    assert float(lines['slimlmm_monitor_agreement{task="(all)"}']) == agreement.share
    assert float(lines['slimlmm_monitor_agreement_n{task="a"}']) == found.tasks[0].agreement.n
    assert float(lines['slimlmm_monitor_seconds{percentile="95",task="(all)"}']) == found.total.seconds.p95
    assert float(lines['slimlmm_monitor_joules_per_request{source="rapl"}']) == 2
    assert float(lines['slimlmm_monitor_drifted{feature="picture brightness"}']) == 1
    last = [ring.at for ring in found.rings if ring.watch == "agreement"][-1]
    assert float(lines['slimlmm_monitor_last_alarm_timestamp_seconds{watch="agreement"}']) == last
    assert float(lines['slimlmm_monitor_alarms{watch="errors"}']) == 0
    assert not any("accuracy" in name for name in lines), "what was not measured has no value"


def test_metrics_are_served_and_an_empty_store_is_waited_for(tmp_path):
    where, port = tmp_path / "store.sqlite", free_port()
    opened(str(where)).dispose()
    command = [sys.executable, "-m", "slimlmm", "monitor", str(where), "--metrics-port", str(port), "--refresh", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()

    def scraped(wanted):
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                text = ""  # it does not listen yet
            if wanted in text:
                return text
            time.sleep(0.3)
        raise AssertionError(f"{wanted} did not come: {said}")

    try:
        assert "slimlmm_monitor_agreement" not in scraped("slimlmm_monitor_refreshed_timestamp_seconds 0.0")
        database = opened(str(where))
        fill(database, {ANSWERS: [answer("1", BEGIN)], PAIRS: [pair("1", BEGIN + 1, agree=True)]})
        assert 'slimlmm_monitor_agreement{task="(all)"} 1.0' in scraped("slimlmm_monitor_agreement{")
        database.dispose()
        with pytest.raises(UserError, match=f"--metrics-port {port}: Address"):
            verb.serve(None, None, None, host="127.0.0.1", port=port, refresh=1, write=False)
    finally:
        process.terminate()
        process.wait(20)
    reader.join(5)
    assert any("holds no answers yet" in line for line in said)


@pytest.mark.parametrize("words", [(), ("--json",), ("--page", "page.html"), ("--prometheus", "one.prom")])
def test_an_empty_store_is_told_with_code_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened("store.sqlite").dispose()
    code, out, err = call(monkeypatch, capsys, "store.sqlite", *words)
    assert (code, out) == (2, "")
    assert "holds no answers yet" in err
    code, _, err = call(monkeypatch, capsys, "none.sqlite", *words)
    assert code == 2
    assert "no such store" in err


def test_labels_are_imported_by_the_verb(tmp_path, monkeypatch, capsys):
    database = opened(str(tmp_path / "store.sqlite"))
    fill(database, {ANSWERS: [answer("1", BEGIN), answer("2", BEGIN + 1)]})
    database.dispose()
    (tmp_path / "labels.csv").write_text("answer_id,correct\n1,true\n2,false\n")
    words = (tmp_path / "store.sqlite", "--import-audits", tmp_path / "labels.csv", "--json")
    code, out, err = call(monkeypatch, capsys, *words)
    assert code == 0
    assert "2 labels imported, 0 changed" in " ".join(err.split())
    accuracy = json.loads(out)["total"]["accuracy"]
    assert (accuracy["count"], accuracy["n"]) == (1, 2)


def test_settings_are_refused_with_all_their_problems(tmp_path, monkeypatch, capsys):
    path = tmp_path / "monitor.yaml"
    path.write_text("margn: 0.1\nreference_days: 0\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert "2 problem(s)" in str(error.value)
    assert "Did you mean 'margin'?" in str(error.value)
    assert "reference_days" in str(error.value)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list"):
        read(path)
    path.write_text("reference_since: 2026-01-05\nevery: 100\n")
    assert read(path).reference_since.isoformat() == "2026-01-05"


def test_a_part_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "slimlmm.monitoring.monitor", None)
    with pytest.raises(UserError, match=r"pip install 'slimlmm\[serve\]'"):
        verb._installed("monitor")


def test_the_verb_is_found_without_heavy_imports():
    heavy = ("torch", "sqlalchemy", "scipy", "matplotlib")
    code = f"import sys; import slimlmm.monitoring.verb; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
