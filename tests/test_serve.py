"""The whole of `slimlmm serve`, in processes of its own: a real model behind LitServe behind the gateway."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import sqlalchemy

from slimlmm import checkpoint
from slimlmm.errors import UserError
from slimlmm.evaluate import evaluate
from slimlmm.serving import settings
from slimlmm.serving.serve import free_port
from slimlmm.serving.settings import read
from slimlmm.serving.store import ANSWERS, PAIRS, opened
from test_beside import saying, threshold
from test_gateway import Fake, as_url, asked, listening, run


@pytest.fixture(scope="module")
def started(teacher):
    """Start servers; yields a function that starts one and returns its process and address once it is ready."""
    running = []

    def start(*options):
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "slimlmm",
            "serve",
            str(teacher),
            "--port",
            str(port),
            "--set",
            "batching.threads=1",
        ]
        process = subprocess.Popen([*command, "--quiet", *options], env={**os.environ, "OMP_NUM_THREADS": "1"})
        running.append(process)
        until = time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200:
                    return process, f"http://127.0.0.1:{port}"
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not start ({process.poll()})")

    yield start
    for process in running:
        process.kill()
        process.wait()


def gone(children):
    _, alive = psutil.wait_procs(children, timeout=20)
    return not alive


def test_it_answers_as_the_evaluation_does_and_its_end_leaves_no_process(started, teacher, rows):
    process, address = started("--set", "limits.tokens=8")
    loaded = checkpoint.load(teacher)
    some = rows.test[:6]
    wanted = evaluate(loaded.model, loaded.processor, some, max_new_tokens=8).answers
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    found = []

    def ask(row):
        request = asked(url=as_url(row.picture_bytes()))
        request["messages"][0]["content"][1]["text"] = row.question
        answer = client.chat.completions.create(model="any", temperature=0, logprobs=True, **request)
        found.append((row.id, " ".join(answer.choices[0].message.content.split()), answer.choices[0].logprobs))

    threads = [threading.Thread(target=ask, args=(row,)) for row in some]
    [one.start() for one in threads]
    [one.join() for one in threads]
    told = {name: text for name, text, _ in found}
    assert [told[row.id] for row in some] == wanted
    assert all(one.logprob <= 0 for _, _, logprobs in found for one in logprobs.content)
    refused = httpx.post(f"{address}/v1/chat/completions", json=asked(n=2))
    assert refused.status_code == 400
    assert "one answer" in refused.json()["error"]["message"]
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    late = threading.Thread(target=ask, args=(some[0],))
    late.start()
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    late.join()
    assert process.wait(30) == 0
    assert len(found) == 7
    assert gone(children)


def test_killed_beside_its_teacher_it_keeps_what_was_answered_and_leaves_no_engine(started, teacher, rows, tmp_path):
    threshold = {"kind": "least", "threshold": 1.0, "rows": 1, "share": 1, "accuracy": 1}
    path, store = tmp_path / "escalation.json", tmp_path / "answers.sqlite"
    path.write_text(json.dumps(threshold | {"student_accuracy": 1, "teacher_accuracy": 1}))
    beside = ["--teacher", str(teacher), "--escalate", str(path), "--shadow", "1", "--candidate", str(teacher)]
    process, address = started("--set", "limits.tokens=8", "--weight", "0", "--store", str(store), *beside)
    request = asked(url=as_url(rows.test[0].picture_bytes()))
    answer = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=60)
    assert answer.status_code == 200
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    assert gone(children)
    with opened(str(store)).connect() as connection:
        (row,) = connection.execute(sqlalchemy.select(ANSWERS)).mappings()
        (pair,) = connection.execute(sqlalchemy.select(PAIRS)).mappings()
    assert (row["route"], row["status"], row["id"]) == ("teacher", 200, answer.headers["x-slimlmm-id"])
    assert row["confidence"] <= 0
    assert (pair["purpose"], pair["agree"]) == ("escalation", True), "both are the same model"


def settled(tmp_path, text, options=None):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return read(path, options or {})


def test_settings_are_a_file_with_options_over_it(tmp_path, teacher):
    found = settled(
        tmp_path,
        f"student: {teacher}\nlimits: {{tokens: 9}}\nteacher: {{urls: [http://x], model: big}}\nshadow: {{share: 0.1}}\n",
        {"shadow.share": 0.2, "limits.at_once": 3, "port": 1},
    )
    assert (found.student.folder, found.teacher.urls, found.teacher.model) == (str(teacher), ("http://x",), "big")
    assert (found.limits.tokens, found.limits.at_once, found.shadow.share, found.port) == (9, 3, 0.2, 1)
    assert found.shown == teacher.name
    assert found.stored is not None
    assert read(None, {"student": "http://a", "student.model": "m"}).student.model == "m"


def test_all_that_is_wrong_with_settings_is_said_at_once(tmp_path):
    with pytest.raises(UserError) as told:
        settled(tmp_path, "student: nowhere\nlimits: {tokens: 0, tokes: 1}\nshadows: {}\n")
    text = str(told.value)
    assert "4 problem(s)" in text
    assert "nowhere: has no config.json; give the folder of a model" in text
    assert "limits.tokens: Input should be greater than 0" in text
    assert "limits.tokes: unknown key" in text
    assert "'tokens'" in text
    for options, wrong in (
        ({"student": "http://a", "shadow.share": 0.1}, "shadow: need a teacher"),
        ({"student": "http://a", "teacher": "http://b"}, "nothing asks it"),
        ({"student": {"urls": ["ftp://a"]}}, "no http:// or https:// address"),
    ):
        with pytest.raises(UserError, match=wrong):
            read(None, options)


def test_escalation_without_log_probabilities_is_refused_before_it_starts(tmp_path):
    path = tmp_path / "escalation.json"
    path.write_text(threshold().model_dump_json())

    async def work(fake):
        async with listening(fake.app) as url:
            command = [sys.executable, "-m", "slimlmm", "serve", url, "--teacher", url, "--escalate", str(path)]
            command += ["--store", str(tmp_path / "answers.sqlite"), "--port", str(free_port())]
            process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            _, told = await process.communicate()
            return process.returncode, " ".join(told.decode().split())

    code, told = run(work(Fake(saying("cola", forgets=True))))
    assert code == 2
    assert "it cannot work, as the student's engine gives no log-probabilities (status 200" in told


def test_the_page_of_settings_is_as_generated():
    page = Path(__file__).parents[1] / "docs" / "serve-settings.md"
    assert page.read_text() == settings.page(), "run python -m slimlmm.serving.settings docs/serve-settings.md"
