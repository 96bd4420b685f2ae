"""Measurement: parameters and FLOPs against independent formulas, time by a clock of our own, memory."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slimlmm import evaluate, measure
from slimlmm.errors import UserError
from test_evaluate import rows_of
from tiny import NAMES, tiny, tiny_folder


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_part_and_counts_once(name):
    model, _ = tiny(name)
    counts = measure.parameters(model)
    distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert counts["total"] == sum(distinct.values()) == sum(n for part, n in counts.items() if part != "total")
    assert "other" not in counts
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert ("head" in counts) is not tied
    assert ("qformer" in counts) is (name == "blip2-opt")
    assert {"vision", "projector", "text", "embeddings", "total"} <= set(counts)


def linear_flops(model, run) -> int:
    """2 x weights x positions over all linear layers and convolutions that really ran."""
    total = 0

    def count(module, _, output):
        nonlocal total
        weight = module.weight
        positions = output.numel() // (output.shape[1] if weight.dim() > 2 else output.shape[-1])
        total += 2 * weight.numel() * positions

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    run()
    for handle in handles:
        handle.remove()
    return total


def test_flops_are_linear_layers_and_attention():
    model, processor = tiny("llava-clip-llama")
    batch, n = evaluate.encode(processor, rows_of()[:1]), 4
    counted = measure.flops(model, processor, batch, answer_tokens=n)
    settings = evaluate.generation_settings(model, processor, n) | {"min_new_tokens": n}
    linear = linear_flops(model, lambda: model.generate(**batch, **settings))
    prompt = batch["input_ids"].shape[1]
    text, vision = model.config.text_config, model.config.vision_config
    lengths = [(prompt, prompt), *((1, prompt + t) for t in range(1, n))]
    attention = sum(text.num_hidden_layers * text.num_attention_heads * 4 * s * t * text.head_dim for s, t in lengths)
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    attention += vision.num_hidden_layers * 4 * tokens**2 * vision.hidden_size
    assert counted == linear + attention


@pytest.mark.parametrize("name", NAMES)
def test_flops_do_not_depend_on_the_attention_kernel(name):
    model, processor = tiny(name)
    batch = evaluate.encode(processor, rows_of()[:1])
    fused = measure.flops(model, processor, batch, answer_tokens=3)
    model.set_attn_implementation("eager")
    assert measure.flops(model, processor, batch, answer_tokens=3) == fused
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flops_per_answer_do_not_depend_on_the_batch():
    model, processor = tiny("llava-dinov2-llama")
    row = rows_of()[0]
    one, four = (evaluate.encode(processor, [row] * n) for n in (1, 4))
    a, b = (measure.flops(model, processor, batch, 3) for batch in (one, four))
    assert a == pytest.approx(b, rel=1e-3)


@pytest.fixture
def clock(monkeypatch):
    """Time goes by only when a fake model answers: `model.costs` gives the seconds of its calls."""
    now, calls = [0.0], []

    def answer(model, processor, rows, limit):
        calls.append((model.name, [row.id for row in rows]))
        now[0] += next(model.costs)
        return ["x"] * len(rows)

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "answer", answer)
    return calls


class Fake:
    def __init__(self, name, costs):
        self.name, self.costs, self.training = name, itertools.cycle(costs), False

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


def test_models_are_compared_in_turns_on_the_same_rows(clock):
    rows = rows_of(1)
    costs = {"a": [9.0, 2.0, 4.0, 6.0], "b": [9.0, 1.0, 1.0, 2.0]}
    a, b = (SimpleNamespace(model=Fake(name, seconds), processor=None) for name, seconds in costs.items())
    found = measure.compare(a, b, rows, n=3, warmup=1, max_new_tokens=5)
    ids = [row.id for row in rows]
    assert clock == [(side, [ids[i % 3]]) for i in range(4) for side in "ab"]
    assert (found.first.p50, found.second.p50, found.first.n) == (4.0, 1.0, 3)
    assert (found.ratio, found.ratio_min, found.ratio_median, found.ratio_max) == (4.0, 2.0, 3.0, 4.0)


def test_latency_and_throughput_leave_the_warm_up_out(clock):
    rows = rows_of(1)
    timing = measure.latency(Fake("a", [7.0, 1.0, 2.0, 3.0]), None, rows, n=3, warmup=1, max_new_tokens=5)
    assert (timing.p50, timing.n, timing.batch_size, timing.rows_per_second) == (2.0, 3, 1, 0.5)
    assert timing.p95 == pytest.approx(2.9)
    timing = measure.throughput(Fake("a", [2.0]), None, rows, batch_size=4, n=2, warmup=1, max_new_tokens=5)
    assert (timing.rows_per_second, timing.n) == (2.0, 2)
    assert [len(ids) for _, ids in clock[-3:]] == [4, 4, 4]
    with pytest.raises(UserError, match="no rows"):
        measure.latency(Fake("a", [1.0]), None, [], max_new_tokens=5)


def test_real_models_are_timed():
    model, processor = tiny("llava-clip-llama")
    timing = measure.throughput(model, processor, rows_of(), batch_size=3, n=2, warmup=1)
    assert 0 < timing.p50 <= timing.p95
    assert not model.training


def test_peak_memory_sees_what_is_freed_again():
    def call():
        np.ones(24 * 2**20 // 8 * 4).sum()

    found = measure.peak_memory(call)
    assert found.kind == "rss"
    assert found.peak - found.before >= 80 * 2**20


@pytest.mark.new_process
def test_answering_memory_is_of_a_new_process(tmp_path):
    folder = tiny_folder("llava-clip-llama", str(tmp_path))
    ballast = np.ones(200 * 2**20 // 8)
    row = replace(rows_of()[0], system="Be short.")
    found = measure.answering_memory(folder, row, max_new_tokens=3)
    assert found.kind == "rss"
    assert 0 < found.before <= found.peak < 2**31
    assert ballast.all()


@pytest.mark.new_process
def test_a_process_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nUserError: absent: no such folder.")
    monkeypatch.setattr(measure.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"absent could not be measured: UserError: absent: no such folder"):
        measure.answering_memory("absent", rows_of()[0], max_new_tokens=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_a_device():
    found = measure.peak_memory(lambda: torch.ones(2**20, device="cuda").sum(), device="cuda")
    assert found.kind == "cuda"
    assert found.peak - found.before >= 4 * 2**20


def test_disk_bytes_counts_all_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    assert measure.disk_bytes(tmp_path) == 15


def test_environment_survives_json():
    found = measure.environment()
    assert measure.Environment.model_validate_json(found.model_dump_json()) == found
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert found.memory > 2**28
    assert found.gpu is None or torch.cuda.is_available()
