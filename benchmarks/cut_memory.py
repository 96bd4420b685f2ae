"""Peak memory of cutting a checkpoint file by file against cutting the loaded model: python benchmarks/cut_memory.py [OUT.json].

A random bfloat16 model (Qwen2.5-VL of 2.4 billion parameters, files of 1 GB) is written tensor by tensor to a temporary
folder. Each variant cuts it in a process of its own: peaks are the kernel's (VmHWM), the part of
them that is no file is sampled (RssAnon, every 20 ms). What counts is the peak less that of the bare imports. Goal of the
streamed cut: student + largest file of the source. One tensor that is scored takes three times its bfloat16 bytes, so that a
small student of a large vocabulary (--layers 6) stays above it.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers as tf
from torch import Tensor

SIZES = {"text.ffn": 4096, "text.width": 1024, "vision.ffn": 1716}
SEED = 0
#: variant -> how it cuts
VARIANTS = {
    "import": "bare imports",
    "self-check": "the proof on the shallow copy alone",
    "streamed": "slimlmm cut, one file written",
    "streamed-1GB": "slimlmm cut --max-shard-size 1GB",
    "streamed-1GB-unproven": "the same without the proof on the shallow copy",
    "in-memory": "load in fp32, cut axis by axis, save in bfloat16; no proof",
}


def config(layers: int = 24) -> Any:
    """Return a Qwen2.5-VL of that many text blocks and a third more vision blocks; 24: 2.4 billion parameters."""
    text: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision: dict[str, Any] = {
        "depth": layers * 4 // 3,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [layers // 3 - 1, layers - 1],
    }
    ids: dict[str, Any] = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    ids |= {"image_token_id": 151655, "video_token_id": 151656}
    return tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16", **ids
    )


def build(folder: Path, layers: int) -> dict[str, Any]:
    """Write the random model; return parameters and bytes."""
    from slimlmm.probing import skeleton
    from slimlmm.weights import Layout

    whole = skeleton(config(layers))
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(config(layers))
    meta = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in whole.shapes.items()
        if name not in whole.tied
    }
    torch.manual_seed(SEED)

    def read(name: str) -> Tensor:
        value = torch.empty(whole.shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
        return value + 1 if value.dim() == 1 else value

    folder.mkdir()
    model.config.save_pretrained(folder)
    Layout(model, meta, 10**9).write(folder, read)
    written = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return {
        "parameters": whole.parameters,
        "source_bytes": sum(written),
        "largest_file_bytes": max(written),
        "files": len(written),
        "text_blocks": layers,
        "cut_to": sizes(model.config),
    }


def in_memory(folder: Path, out: Path) -> None:
    """Cut the loaded model, as `slimlmm cut` did before it went file by file, with weights back in their format."""
    from slimlmm import checkpoint, importance, plan, surgery
    from slimlmm.anatomy import describe

    loaded = checkpoint.load(folder)
    student = loaded.model
    for name, size in sizes(student.config).items():
        anatomy = describe(student.config)
        scores = importance.score(student, anatomy, [name], "magnitude")
        student = surgery.cut(student, anatomy, name, plan.choose(scores, anatomy, name, size))
    checkpoint.save(checkpoint.as_stored(student, loaded.stored), None, out, source=folder)


def sizes(whole: Any) -> dict[str, int]:
    """Return the sizes that are cut to: three quarters of the blocks, half of the rest."""
    return SIZES | {"text.blocks": whole.text_config.num_hidden_layers * 3 // 4}


def run(variant: str, folder: Path, out: Path) -> None:
    """Do what a variant does, in this process."""
    from slimlmm import checkpoint, commands, streaming
    from slimlmm.selfcheck import self_check

    if variant == "import":
        return
    whole = checkpoint.load_config(folder)
    words = [f"{name}={size}" for name, size in sizes(whole).items()]
    if variant == "self-check":
        self_check(whole, sizes(whole))
    elif variant == "streamed":
        commands.cut(str(folder), out, words)
    elif variant == "streamed-1GB":
        commands.cut(str(folder), out, words, max_shard_size="1GB")
    elif variant == "streamed-1GB-unproven":
        streaming.cut_folder(checkpoint.open_weights(folder), sizes(whole), out, max_shard_size="1GB")
    elif variant == "in-memory":
        in_memory(folder, out)


def status() -> dict[str, int]:
    """Return this process's memory in bytes, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmHWM", "RssAnon", "RssFile")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def measured(variant: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one variant and return its peaks in bytes and its seconds."""
    peak_anon, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_anon
        while not done.wait(0.02):
            peak_anon = max(peak_anon, status()["RssAnon"])

    watcher, start = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    run(variant, folder, out)
    done.set()
    watcher.join()
    return {
        "peak_rss": status()["VmHWM"],
        "peak_anon": max(peak_anon, status()["RssAnon"]),
        "seconds": time.perf_counter() - start,
    }


def report(facts: Mapping[str, Any], found: Mapping[str, list[dict[str, float]]], student: int) -> dict[str, Any]:
    """Put the medians against the bare imports and the goal."""
    base = min(one["peak_rss"] for one in found["import"])
    anon = min(one["peak_anon"] for one in found["import"])
    goal = student + facts["largest_file_bytes"]
    variants = {}
    for name, runs in found.items():
        worst = max(one["peak_rss"] for one in runs) - base
        variants[name] = {
            "what": VARIANTS[name],
            "n": len(runs),
            "peak_above_import_bytes": worst,
            "peak_anon_above_import_bytes": max(one["peak_anon"] for one in runs) - anon,
            "share_of_goal": worst / goal,
            "seconds": [round(one["seconds"], 1) for one in runs],
        }
    return {
        "model": "random Qwen2.5-VL, bfloat16, tied",
        **facts,
        "seed": SEED,
        "student_bytes": student,
        "goal_bytes": goal,
        "import_rss_bytes": base,
        "variants": variants,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": tf.__version__,
            "safetensors": safetensors.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    """Measure every variant in processes of their own and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write (default: print)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each variant; the worst peak counts")
    parser.add_argument("--layers", type=int, default=24, help="text blocks: 24 for 2.4 billion parameters")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, folder, out = arguments.child
        print(json.dumps(measured(variant, Path(folder), Path(out))))
        return
    with tempfile.TemporaryDirectory() as parent:
        source, target = Path(parent) / "model", Path(parent) / "student"
        facts = build(source, arguments.layers)
        found: dict[str, list[dict[str, float]]] = {}
        student = 0
        for variant in ["import", *(one for one in arguments.only if one != "import")]:
            for _ in range(arguments.runs):
                command = [sys.executable, __file__, "--child", variant, str(source), str(target)]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{variant} ended with {done.returncode} (-9: out of memory). {done.stderr[-2000:]}")
                found.setdefault(variant, []).append(json.loads(done.stdout.splitlines()[-1]))
                print(variant, found[variant][-1], file=sys.stderr)
                student = sum(path.stat().st_size for path in target.glob("*.safetensors")) or student
        text = json.dumps(report(facts, found, student), indent=1) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
