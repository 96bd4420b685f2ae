"""The peers at equal budget: one arm to its student, evaluated here, compared with ours on the same test rows.

    slimlmm adreview ads --train 40000 --val 500 --test 2000
    python benchmarks/peers/run.py ours-18x paper-18x --data ads --out runs/peers --row-visits 80000
    python benchmarks/peers/run.py all --data ads --out runs/peers --row-visits 80000
    python benchmarks/peers/table.py runs/peers                      # the table of the README, and the results beside it

Each peer runs in an environment of its own, made under OUT/environments from requirements/NAME.txt, and leaves a plain folder.
The same command goes on where it was stopped: an arm with an outcome is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from arms import ARMS, HERE, arm
from pydantic import Field
from shared import Outcome, Task

import slimlmm
from slimlmm import checkpoint, data
from slimlmm.demo import bundled
from slimlmm.errors import UserError
from slimlmm.evaluate import Accuracy, Evaluation, Interval, drop, evaluate
from slimlmm.measure import Environment, environment
from slimlmm.progress import Lines
from slimlmm.results import File


class Result(File):
    """One arm, measured."""

    arm: str = Field(description="Its name.")
    told: str = Field(description="What it is, in a sentence.")
    command: str = Field(description="Command line that made it.")
    seed: int = Field(description="Seed of every random choice.")
    versions: dict[str, str] = Field(description="Versions in the environment that trained it.")
    parameters: int = Field(description="Parameters of its student, all counted.")
    row_visits: int = Field(description="Rows seen in training.")
    training_seconds: float = Field(description="Wall time of its trainings.")
    seconds: float = Field(description="Wall time before the evaluation, of the last attempt where it was interrupted.")
    cpu_seconds: float = Field(
        description="Processor time of the same, which other work on the machine does not lengthen."
    )
    threads: int = Field(description="Threads of its process.")
    accuracy: Accuracy = Field(description="Exact match on the test rows, with n and standard errors.")
    behind: Interval | None = Field(
        None, description="Our arm's accuracy minus this one's, paired over pictures; null for ours."
    )
    notes: tuple[str, ...] = Field((), description="What else it said.")
    could_not: tuple[str, ...] = Field((), description="What the peer cannot do here, and why.")
    machine: Environment = Field(description="Machine and versions of the evaluation.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", help=f"all, or of: {', '.join(ARMS)}")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--row-visits", type=int, default=80_000)
    parser.add_argument("--test-rows", type=int, default=2_000)
    parser.add_argument("--timeout", type=float, default=8.0, help="hours after which an arm is given up")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = list(ARMS) if arguments.arms == ["all"] else arguments.arms
    for name in names:  # all names first: nothing runs before they are known
        arm(name)
    for name in names:
        found = measured(name, arguments)
        gap = "" if found.behind is None else f", {100 * found.behind.mean:+.1f} points behind {arm(name).own}"
        print(f"{name}: {100 * found.accuracy.overall.accuracy:.1f} % of {found.accuracy.overall.n}{gap}")


def measured(name: str, arguments: argparse.Namespace) -> Result:
    """Return the result of an arm, made now unless it is there."""
    chosen, out = arm(name), arguments.out.resolve()
    task = Task(
        arm=name,
        teacher=bundled("teacher"),
        data=arguments.data.resolve(),
        out=out / name,
        cache=out / "cache",
        recipe=chosen.recipe,
        row_visits=arguments.row_visits,
        test_rows=arguments.test_rows,
        seed=arguments.seed,
        own=out / chosen.own,
    )
    if name != chosen.own and not (task.own / "answers.json").exists():
        raise UserError(f"{name} is compared with {chosen.own}, which is not there yet; run that first.")
    claimed(task)
    took = task.out / "seconds.json"
    if not took.exists():
        python = (
            environment_of(chosen.environment, out / "environments") if chosen.environment else Path(sys.executable)
        )
        took.write_text(json.dumps(carried_out(task, python, arguments.timeout)))
    answers = answered(task)
    did = Outcome.load(task.out / "outcome.json")
    own = None if name == chosen.own else Evaluation.model_validate_json((task.own / "answers.json").read_bytes())
    found = Result(
        arm=name,
        told=chosen.told,
        command=" ".join(["python benchmarks/peers/run.py", name, *command(arguments)]),
        seed=task.seed,
        versions=did.versions,
        parameters=checkpoint.load(task.student).model.num_parameters(),
        row_visits=did.row_visits,
        training_seconds=did.training_seconds,
        **json.loads(took.read_text()),
        threads=torch.get_num_threads(),
        accuracy=answers.summary,
        behind=None if own is None else drop(own, answers, seed=task.seed),
        notes=did.notes,
        could_not=did.could_not,
        machine=environment(),
    )
    found.save(out / f"{name}.json")
    return found


def command(arguments: argparse.Namespace) -> list[str]:
    """Return the options that decide a result."""
    return [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in ("row_visits", "test_rows", "seed")]


def claimed(task: Task) -> None:
    """Write the arm's orders down, or find the same there; an arm of another budget, other rows or another seed is refused."""
    path = task.out / "task.json"
    if path.exists():
        before = Task.load(path)
        changed = [key for key, value in task if value != getattr(before, key)]
        if changed:
            raise UserError(f"{task.out} is of another run ({', '.join(changed)} changed). Choose another --out.")
        return
    task.out.mkdir(parents=True)
    task.save(path)


def carried_out(task: Task, python: Path, hours: float) -> dict[str, float]:
    """Run the arm by the Python of its environment; return the wall and processor time that it took.

    Raises:
        UserError: it failed, or took longer than `hours`.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    package = str(Path(slimlmm.__file__).parent.parent)
    order = [str(python), str(HERE / "arms.py"), str(task.out / "task.json")]
    try:
        subprocess.run(order, check=True, timeout=3600 * hours, env={**os.environ, "PYTHONPATH": package})
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{task.arm} was given up after {hours} hours.") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{task.arm} failed with exit code {error.returncode}; what it said stands above.") from error
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}


def environment_of(name: str, environments: Path) -> Path:
    """Return the Python of a peer's environment, made on first use from its pinned requirements."""
    folder, pins = environments / name, HERE / "requirements" / f"{name}.txt"
    python, ready = folder / "bin" / "python", folder / "pins.txt"
    if not ready.exists() or ready.read_bytes() != pins.read_bytes():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)]
        subprocess.run(install, check=True)
        ready.write_bytes(pins.read_bytes())
    return python


def answered(task: Task) -> Evaluation:
    """Return the student's answers to the test rows, given now unless they are there."""
    path = task.out / "answers.json"
    if not path.exists():
        student = checkpoint.load(task.student)
        test = data.sample(data.load(task.data).need("test", task.data), task.test_rows, task.seed)
        with Lines() as tell:
            answers = evaluate(
                student.model,
                student.processor,
                test,
                progress=lambda done, total: tell.step(f"test, {task.arm}", done, total),
            )
        path.write_text(answers.model_dump_json(), encoding="utf-8")
    return Evaluation.model_validate_json(path.read_bytes())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"peers: {error}", file=sys.stderr)
        sys.exit(2)
