"""The whole of `slimlmm serve`, in processes of its own: a real model behind LitServe behind the gateway."""

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import psutil
import pytest

from slimlmm import checkpoint
from slimlmm.errors import UserError
from slimlmm.evaluate import evaluate
from slimlmm.progress import Quiet
from slimlmm.serving.serve import Serving, free_port, serve
from test_gateway import as_url, asked


@pytest.fixture(scope="module")
def started(teacher):
    """Start servers; yields a function that starts one and returns its process and address once it is ready."""
    running = []

    def start(*options):
        port = free_port()
        command = [sys.executable, "-m", "slimlmm", "serve", str(teacher), "--port", str(port), "--threads", "1"]
        process = subprocess.Popen([*command, "--quiet", *options], env={**os.environ, "OMP_NUM_THREADS": "1"})
        running.append(process)
        until = time.monotonic() + 120
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
    process, address = started("--max-tokens", "8")
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


def test_a_gateway_that_is_killed_takes_its_engine_along(started):
    process, _ = started()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    assert gone(children)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; give the folder of a model"):
        serve(Serving(student=str(tmp_path)), Quiet())
