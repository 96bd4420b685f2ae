"""Thousands of generated requests, valid and not, against a whole gateway with a real student: no 500, no hang, no leak.

    python benchmarks/hostile.py STUDENT --st PATH_OF_SCHEMATHESIS --out benchmarks/results/hostile.json

Schemathesis (`pip install schemathesis`, in an environment of its own) reads our OpenAPI document: what it sends follows what the
document says and breaks it. Broken HTTP, bombs and slow senders are in tests/test_hostile.py.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from slimlmm import __version__
from slimlmm.serving.serve import free_port


def counted(address: str) -> dict[str, int]:
    """Return answers by status."""
    text = httpx.get(f"{address}/metrics").text
    return {status: int(float(n)) for status, n in re.findall(r'slimlmm_requests_total\{status="(\d+)"\} (\S+)', text)}


def gauges(address: str) -> dict[str, float]:
    """Return what is held and what was not recorded."""
    text = httpx.get(f"{address}/metrics").text
    return {
        name: float(n) for name, n in re.findall(r"^slimlmm_(inside|waiting|store_failed) (\S+)", text, re.MULTILINE)
    }


def one_run(st: str, address: str, process: psutil.Process, seed: int, examples: int) -> dict[str, Any]:
    """Send the requests of one seed; returns statuses, seconds and memory."""
    before, memory, began = counted(address), process.memory_info().rss, time.perf_counter()
    command = [st, "run", f"{address}/openapi.json", "--max-examples", str(examples), "--seed", str(seed)]
    command += ["--checks", "not_a_server_error", "--continue-on-failure", "--request-timeout", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = counted(address)
    statuses = {status: n - before.get(status, 0) for status, n in after.items() if n > before.get(status, 0)}
    return {
        "seed": seed,
        "passed": done.returncode == 0,
        "requests": sum(statuses.values()),
        "statuses": statuses,
        "seconds": round(time.perf_counter() - began, 1),
        "memory_mb": [round(memory / 1e6, 1), round(process.memory_info().rss / 1e6, 1)],
        "left": gauges(address),
    }


def started(student: str, port: int, store: str) -> subprocess.Popen[bytes]:
    """Serve the student beside itself as teacher, with a store; returns the process once it is ready."""
    command = [sys.executable, "-m", "slimlmm", "serve", student, "--teacher", student, "--store", store]
    options = f"--shadow 0.2 --port {port} --quiet --set limits.tokens=8 --set batching.threads=1"
    gateway = subprocess.Popen([*command, *options.split()])
    for _ in range(1200):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return gateway
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("the gateway did not start")


def main() -> None:
    """Send to a gateway, and end it."""
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("student")
    told.add_argument("--st", default="st")
    told.add_argument("--examples", type=int, default=1200)
    told.add_argument("--seeds", type=int, default=3)
    told.add_argument("--out", type=Path)
    args = told.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        gateway = started(args.student, port, f"{folder}/answers.sqlite")
        process, seeds = psutil.Process(gateway.pid), range(1, args.seeds + 1)
        runs = [one_run(args.st, f"http://127.0.0.1:{port}", process, seed, args.examples) for seed in seeds]
        gateway.send_signal(signal.SIGTERM)
        ended = gateway.wait(60)
    version = subprocess.run([args.st, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    found = {
        "at": time.strftime("%Y-%m-%d"),
        "slimlmm": __version__,
        "schemathesis": version,
        "ended": ended,
        "runs": runs,
    }
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
