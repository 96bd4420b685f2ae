"""The certificate of a checkpoint: hashes of its files, and what it answered in a new process with stock classes alone.

`certify` writes ``certificate.json`` into a folder, `verify` holds the folder against it at any time, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from slimlmm import checkpoint, probes
from slimlmm.data import Row
from slimlmm.errors import UserError
from slimlmm.evaluate import Record, evaluating
from slimlmm.families import PROMPTS, stock_class
from slimlmm.files import sha256
from slimlmm.intake import PICKLES
from slimlmm.measure import Environment, disk_bytes, environment
from slimlmm.results import File
from slimlmm.shards import first_of

NAME = "certificate.json"
FORMAT: Literal[1] = 1
#: probes, and at most so many real rows, that are asked
ROWS = 8
#: tokens that an answer may have
LIMIT = 16
#: Part of the largest logit by which rounding may move one. float32 on other processors, other kernels and other versions
#: moves logits by 1e-6 to 1e-5 of it; a wrong weight moves them by far more than a thousandth.
TIE = 1e-3
#: endings of files that run when they are loaded, or are weights of other runtimes
CODE = (*PICKLES, ".py", ".pyc", ".so", ".dll", ".h5", ".msgpack", ".npy", ".npz", ".gguf")
_ATTENTION = ("eager", "sdpa")
#: seconds that the new process may take, and more of them for each GB of files: loading and answering take a few on any machine
PATIENCE, PATIENCE_A_GB = 900.0, 120.0


class Digest(Record):
    """One file."""

    sha256: str = Field(description="SHA-256 of its bytes.")
    bytes: int = Field(description="Its size.")


class Probe(Record):
    """What the model answered to one made-up question (`probes.question`, `probes.picture` of its number)."""

    question: str = Field(description="Text asked.")
    picture: str = Field(description="SHA-256 of size and pixels of the picture.")
    tokens: tuple[int, ...] = Field(description="Greedy token ids, float32 arithmetic.")
    margins: tuple[float, ...] = Field(description="Best logit minus the next best, per token.")
    scale: float = Field(ge=0, allow_inf_nan=False, description="Largest absolute logit.")

    @model_validator(mode="after")
    def _margin_per_token(self) -> Self:
        if len(self.tokens) != len(self.margins):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.margins)} margins")
        return self


class RealRows(Record):
    """Real rows asked of the model in memory and of the new process; nothing of their content is kept."""

    compared: int = Field(description="Rows asked.")
    equal: int = Field(description="Rows whose token ids were equal.")


class Certificate(File):
    """What is known of a checkpoint folder since it was written."""

    WHAT: ClassVar[str] = "certificate"

    format: Literal[1] = Field(FORMAT, description="Version of this format.")
    environment: Environment = Field(description="Machine and versions that it was made with.")
    device: str = Field(description="cpu or cuda.")
    kernels: str = Field(description="Kernels that torch chose for the processor, such as AVX512.")
    attention: str | None = Field(description="Attention implementation; null where the parts differ.")
    model_type: str = Field(description="model_type of its stock config.")
    parameters: int = Field(description="Parameters, tied ones once.")
    files: dict[str, Digest] = Field(description="Every file of the folder but this one and hidden ones.")
    side: int = Field(ge=1, le=probes.LARGEST, description="Pixels a side of the probes' pictures.")
    limit: int = Field(ge=1, le=1024, description="Tokens that an answer may have.")
    tie: float = Field(ge=0, le=0.1, description="Part of `scale` below which a margin is a tie.")
    probes: tuple[Probe, ...] = Field(
        min_length=1, max_length=1000, description="Made-up questions, in the order of their numbers."
    )
    rows: RealRows = Field(description="Real rows, compared once, when this was written.")


class Check(Record):
    """One check of a folder: fine where there are no failures."""

    name: str = Field(description="What was checked.")
    said: str = Field(description="What was found, in a few words.")
    failures: tuple[str, ...] = Field((), description="Each thing that is wrong.")


class Verdict(Record):
    """What `verify` found."""

    folder: str = Field(description="Folder that was checked.")
    certified: bool = Field(description="Whether it holds a certificate that can be read.")
    sha256: str | None = Field(description="SHA-256 of the certificate, to be compared with one published elsewhere.")
    checks: tuple[Check, ...] = Field(description="Every check, in order.")

    @property
    def failures(self) -> tuple[str, ...]:
        """Each failure with the name of its check."""
        return tuple(f"{check.name}: {failure}" for check in self.checks for failure in check.failures)


def certify(
    folder: str | Path,
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    parameters: int,
    *,
    count: int = ROWS,
) -> Certificate:
    """Load a written folder in a new process with stock classes, compare its answers with the model's, write the certificate.

    `model` is the one in memory that the folder was written from, in the number format of its files. `count` probes and
    at most as many `rows` are asked, all in float32, so that the format's own rounding is not in question.

    Raises:
        UserError: a token id, a key, the number of parameters or a kind of file is not what it must be.
    """
    folder = Path(folder)
    if problems := [*code_in(folder)]:
        raise UserError(f"{folder}: cannot be certified: {'; '.join(problems)}.")
    with TemporaryDirectory() as scratch:
        order = _order(folder, model.config, count, _pictures(rows[:count], Path(scratch)))
        order["device"], order["side"] = model.device.type, probes.side_of(processor)
        with evaluating(model), _in_float32(model):
            mine = probes.answers(model, processor, order)
        fresh = afresh(order)
    problems = _differences(fresh, mine, count, parameters)
    if problems:
        raise UserError(
            f"{folder}: cannot be certified: in a new process with stock classes {'; '.join(problems)}. "
            "This is an error of slimlmm or a damaged disk, please report it; nothing was put in place."
        )
    found = _written_down(order, model.config, fresh, digests(folder))
    found.save(folder / NAME)
    return found


def verify(folder: str | Path, *, count: int | None = None, without: bool = False) -> Verdict:
    """Hold a folder against its certificate: files, kinds of files, keys, parameters, answers to `count` probes (default all).

    `without`: a folder without a certificate is no failure; what can be checked of it still is.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    certificate, first = _certificate(folder, without)
    checks = [first]
    if certificate:
        checks.append(_files(folder, certificate))
    problems = tuple(code_in(folder))
    checks.append(Check(name="safe formats", said="safetensors, no code", failures=problems))
    loading = _weights(folder)
    if not loading.failures:
        order = _order(folder, checkpoint.load_config(folder), count or ROWS, ())
        loading, *others = _asked(order, certificate)
        checks += [loading, *others]
    else:
        checks.append(loading)
    digest = hashlib.sha256((folder / NAME).read_bytes()).hexdigest() if certificate else None
    return Verdict(folder=str(folder), certified=certificate is not None, sha256=digest, checks=tuple(checks))


def afresh(order: probes.Order) -> dict[str, Any]:
    """Return what `probes.told` finds in a new process that imports nothing of slimlmm and reaches no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    with TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        # -P: the modules beside that script must not stand in front of those of Python
        command = [sys.executable, "-P", str(Path(probes.__file__).resolve()), str(answer)]
        limit = PATIENCE + PATIENCE_A_GB * disk_bytes(order["folder"]) / 1e9
        try:
            done = subprocess.run(
                command,
                input=json.dumps(order),
                capture_output=True,
                text=True,
                check=False,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"the new process did not answer within {limit:.0f} s and was ended"}
        if done.returncode or not answer.exists():
            last = ([line for line in done.stderr.splitlines() if line.strip()] or ["without a word"])[-1]
            return {"error": f"the new process ended with {done.returncode}: {last}"}
        found: dict[str, Any] = json.loads(answer.read_bytes())
    assert not found.get("own"), found["own"]
    return found


def digests(folder: Path) -> dict[str, Digest]:
    """Return size and hash of every file of a folder but the certificate and hidden ones (of git, of download caches)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME and not any(part.startswith(".") for part in name.split("/")):
            found[name] = Digest(sha256=sha256(path), bytes=path.stat().st_size)
    return found


def code_in(folder: Path) -> Iterator[str]:
    """Yield each file that is code, a pickle or no file at all, and each JSON file that asks for code."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.lower().endswith(CODE):
            yield f"{name} may run code when it is loaded, or holds weights that are not safetensors"
        elif not path.is_file() and not path.is_dir():
            yield f"{name} is neither a file nor a folder"
    for path in sorted(folder.glob("*.json")):
        if path.is_file() and path.name != NAME and (problem := _asks_for_code(path)):
            yield f"{path.name} {problem}"


def _asks_for_code(path: Path) -> str:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"is no JSON that can be read ({type(error).__name__})"
    return "asks for code of its own (auto_map)" if isinstance(data, dict) and "auto_map" in data else ""


def _order(folder: Path, config: Any, count: int, pictures: Sequence[tuple[str, str, str]]) -> probes.Order:
    return {
        "folder": str(folder),
        "auto": stock_class(config).__name__,
        "plain": PROMPTS,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "attention": _attention(config),
        "side": probes.USUAL,
        "probes": count,
        "limit": LIMIT,
        "pictures": pictures,
    }


def _attention(config: Any) -> str | None:
    """Return how all parts of a model attend, None where they differ: a part may not know the way that is the others'."""
    parts = (config, *(getattr(config, key) for key in config.sub_configs))
    ways = {getattr(part, "_attn_implementation", None) for part in parts}
    return ways.pop() if len(ways) == 1 and ways < {*_ATTENTION} else None


def _pictures(rows: Sequence[Row], scratch: Path) -> list[tuple[str, str, str]]:
    """Write the pictures of rows, decoded, as files for the new process."""
    files = []
    for number, row in enumerate(rows):
        path = scratch / f"{number}.png"
        row.open().save(path)
        files.append((str(path), *row.asked))
    return files


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Let every weight be its value in float32, as loading in float32 has it; then put back the very tensors there were."""
    before = {name: tensor.data for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    stored = set(model.state_dict(keep_vars=True))
    own = dict((*model.named_parameters(), *model.named_buffers()))
    for name, tensor in own.items():
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for name, tensor in own.items():
            tensor.data = before[name]


def _differences(fresh: Mapping[str, Any], mine: Sequence[probes.Answer], count: int, parameters: int) -> list[str]:
    """Name all in which the new process differs from the model in memory."""
    if "error" in fresh:
        return [str(fresh["error"])]
    problems = [f"{kind} keys: {first_of(keys)}" for kind, keys in fresh["keys"].items() if keys]
    if fresh["parameters"] != parameters:
        problems.append(f"it has {fresh['parameters']:,} parameters, {parameters:,} were planned")
    for number, (one, other) in enumerate(zip(mine, fresh["answers"], strict=True)):
        what = f"probe {number}" if number < count else f"row {number - count}"
        if one["tokens"] != other["tokens"]:
            problems.append(f"{what} has the token ids {other['tokens']}, in memory {one['tokens']}")
    return problems


def _written_down(order: probes.Order, config: Any, fresh: Mapping[str, Any], files: dict[str, Digest]) -> Certificate:
    """Return the certificate of what the new process answered, where that is what the model in memory answers."""
    asked, compared = fresh["answers"][: order["probes"]], len(order["pictures"])
    return Certificate(
        environment=environment(),
        device=order["device"],
        kernels=_kernels(),
        attention=order["attention"],
        model_type=config.model_type,
        parameters=fresh["parameters"],
        files=files,
        side=order["side"],
        limit=order["limit"],
        tie=TIE,
        probes=tuple(Probe(question=probes.question(number), **one) for number, one in enumerate(asked)),
        rows=RealRows(compared=compared, equal=compared),
    )


def _certificate(folder: Path, without: bool) -> tuple[Certificate | None, Check]:
    path = folder / NAME
    if not path.is_file():
        failure = f"there is no {NAME}; --without-certificate checks the rest alone"
        return None, Check(name="certificate", said="none", failures=() if without else (failure,))
    try:
        found = Certificate.load(path)
    except UserError as error:
        return None, Check(name="certificate", said="broken", failures=(str(error),))
    by = found.environment
    versions = f"slimlmm {by.versions.get('slimlmm', '?')}, transformers {by.versions.get('transformers', '?')}"
    return found, Check(name="certificate", said=f"{by.created}, {versions}, {by.system}")


def _files(folder: Path, certificate: Certificate) -> Check:
    """Compare the files with their hashes."""
    there, named = digests(folder), certificate.files
    failures = [f"{name} is missing" for name in sorted(named.keys() - there.keys())]
    failures += [f"{name} is not in the certificate" for name in sorted(there.keys() - named.keys())]
    failures += [
        f"{name} has changed ({there[name].bytes:,} bytes, certified {named[name].bytes:,})"
        for name in sorted(there.keys() & named.keys())
        if there[name] != named[name]
    ]
    size = sum(one.bytes for one in there.values())
    return Check(name="files", said=f"{len(there)} files, {size:,} bytes", failures=tuple(failures))


def _weights(folder: Path) -> Check:
    """Read the heads of the files of weights against the configuration, before a process is started for them."""
    try:
        checkpoint.open_weights(folder)
    except UserError as error:
        return Check(name="loading", said="not loaded", failures=(str(error),))
    return Check(name="loading", said="")


def _asked(order: probes.Order, certificate: Certificate | None) -> list[Check]:
    """Load the folder in a new process and ask it; hold keys, parameters and answers against the certificate."""
    if certificate:
        _as_certified(order, certificate)
    else:
        order["probes"] = 1
    fresh = afresh(order)
    if "error" in fresh:
        return [Check(name="loading", said="not loaded", failures=(str(fresh["error"]),))]
    keys = tuple(f"{kind} keys: {first_of(found)}" for kind, found in fresh["keys"].items() if found)
    said = f"stock {order['auto']}, a new process, no key missing or left over"
    loading = Check(name="loading", said="stock classes, keys differ" if keys else said, failures=keys)
    counted = f"{fresh['parameters']:,}"
    if certificate is None:
        tokens = len(fresh["answers"][0]["tokens"])
        return [
            loading,
            Check(name="parameters", said=counted),
            Check(name="answers", said=f"answers, {tokens} tokens; nothing to compare with"),
        ]
    wrong = () if fresh["parameters"] == certificate.parameters else (f"{certificate.parameters:,} were certified",)
    return [
        loading,
        Check(name="parameters", said=counted, failures=wrong),
        _compared(fresh["answers"], certificate, _same_arithmetic(order, certificate)),
    ]


def _as_certified(order: probes.Order, certificate: Certificate) -> None:
    """Let the new process calculate as the one of the certificate did, as far as this machine can."""
    cuda = certificate.device == "cuda" and torch.cuda.is_available()
    order["device"] = "cuda" if cuda else "cpu"
    order["threads"] = max(1, min(certificate.environment.threads, os.cpu_count() or 1))
    order["attention"] = certificate.attention if certificate.attention in _ATTENTION else None
    order["side"], order["limit"] = certificate.side, certificate.limit
    order["probes"] = min(order["probes"], len(certificate.probes))


def _same_arithmetic(order: probes.Order, certificate: Certificate) -> bool:
    """Whether versions, processor, device and threads are those of the certificate, so that every bit must be."""
    here, there = environment(), certificate.environment
    fields = ["system", "cpu", *(["gpu"] if order["device"] == "cuda" else [])]
    versions = [{name: one for name, one in side.versions.items() if name != "slimlmm"} for side in (here, there)]
    return (
        versions[0] == versions[1]
        and all(getattr(here, name) == getattr(there, name) for name in fields)
        and (order["device"], order["threads"]) == (certificate.device, there.threads)
        and _kernels() == certificate.kernels
    )


def _kernels() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _compared(found: Sequence[probes.Answer], certificate: Certificate, same: bool) -> Check:
    """Compare answers: every token and margin on the same machine and versions, else tokens that were no near tie."""
    failures, ties = [], 0
    for number, (one, probe) in enumerate(zip(found, certificate.probes, strict=False)):
        slack = certificate.tie * probe.scale
        if one["picture"] != probe.picture or probe.question != probes.question(number):
            failures.append(f"probe {number} is not the one that was certified (picture or question)")
        elif tuple(one["tokens"]) != probe.tokens:
            if not same and _tied(one["tokens"], probe, slack):
                ties += 1
            else:
                failures.append(f"probe {number} gives the token ids {one['tokens']}, certified {list(probe.tokens)}")
        elif same and not all(abs(a - b) <= slack for a, b in zip(one["margins"], probe.margins, strict=True)):
            failures.append(f"probe {number} gives the same token ids by other logits")
    how = "same versions and processor: to the token" if same else f"other versions or processor: {ties} near ties"
    return Check(name="answers", said=f"{len(found)} probes, {how}", failures=tuple(failures))


def _tied(tokens: Sequence[int], probe: Probe, slack: float) -> bool:
    """Whether the first token that differs was certified with a margin that rounding may turn; what follows it tells nothing."""
    pairs = enumerate(zip(tokens, probe.tokens, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), None)
    return first is not None and probe.margins[first] <= slack
