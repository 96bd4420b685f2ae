"""Peak memory of Taylor scoring against model + activations: python benchmarks/taylor_memory.py [MODEL].

Each mode runs in a process of its own; what counts is its peak resident size, less that of the bare imports.
`forward` is the model and one batch with its graph, `taylor` scores every axis, `backward` keeps gradients.
Without MODEL a random LLaVA is built. Prints one JSON object; taylor_ratio = taylor / forward stays <= 1.3.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
import transformers as tf
from torch import Tensor

MODES = ("import", "forward", "taylor", "backward")


def build(width: int) -> tf.PreTrainedModel:
    """Return a random LLaVA (DINOv2 tower, Llama text) of `width` channels in the text tower."""
    vision = tf.Dinov2Config(hidden_size=width // 2, num_hidden_layers=6, num_attention_heads=8, image_size=112)
    text = tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        tie_word_embeddings=True,
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=7999, tie_word_embeddings=True)
    torch.manual_seed(0)
    model: tf.PreTrainedModel = tf.LlavaForConditionalGeneration(config).train(False)
    return model


def batch_for(model: tf.PreTrainedModel, size: int) -> dict[str, Tensor]:
    """Return random pictures behind a prompt of image tokens and random text."""
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    pictures = (side // patch) ** 2
    ids = torch.randint(3, 1000, (size, pictures + 16))
    ids[:, :pictures] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(size, 3, side, side)}


def loss(model: tf.PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return next-token cross-entropy on the text after the picture."""
    from slimlmm.forward import forward

    logits = forward(model, batch).logits[:, -16:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -15:].flatten())


def measure(mode: str, model_id: str | None, width: int, size: int) -> dict[str, float]:
    """Run one mode in this process; return its peak resident size in MB and the parameters in millions."""
    from slimlmm import anatomy, checkpoint, importance

    if mode == "import":
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "parameters_m": 0.0}
    model = checkpoint.load(model_id).model if model_id else build(width)
    batch = batch_for(model, size)
    if mode == "taylor":
        described = anatomy.describe(model.config)
        axes = [a.name for a in described.axes.values() if a.kind in ("inner", "width") and not a.refusal]
        importance.score(model, described, axes, "taylor", [batch], loss)
    else:
        value = loss(model, batch)
        if mode == "backward":
            value.backward()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "parameters_m": parameters}


def main() -> None:
    """Measure every mode in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a LLaVA folder (default: a random one)")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(measure(arguments.mode, arguments.model, arguments.width, arguments.batch)))
        return
    found = {}
    for mode in MODES:
        command = [sys.executable, *sys.argv, "--mode", mode]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[mode] = json.loads(output.splitlines()[-1])
    start = found["import"]["peak_mb"]
    net = {mode: found[mode]["peak_mb"] - start for mode in MODES[1:]}
    report = {
        "parameters_m": found["taylor"]["parameters_m"],
        "interpreter_mb": start,
        "peak_mb_above_interpreter": net,
        "taylor_ratio": net["taylor"] / net["forward"],
        "backward_ratio": net["backward"] / net["forward"],
        "goal": 1.3,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
