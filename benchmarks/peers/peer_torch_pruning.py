"""torch-pruning: widths, FFNs and heads of the whole LLaVA by its dependency graph; our trainings between its cuts.

It writes no configuration, so the shapes that it leaves are read off the weights and put into the stock class. One share of every
width and FFN is kept, the largest whose model has no more parameters than ours after the same round.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from shared import Outcome, Task, cache_of, outcome, recipe_of, rounds_of, save, train_rows, trained
from transformers import PreTrainedModel

from slimlmm import checkpoint
from slimlmm.errors import UserError
from slimlmm.families import stock_class
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import predict_parameters

#: shares that are tried, in these parts of the teacher's sizes: all widths and FFNs come out whole
PARTS = 96
HEAD_DIM = 64
#: query heads that stay with every key/value head: at one it takes the group for plain heads, would empty the keys, and cuts none
LEAST_QUERIES = 2
#: what nothing reads in this LLaVA (it takes the states before the last norm): no graph reaches it, so it is left as initialised
UNUSED = tuple(f"model.vision_tower.{name}" for name in ("embeddings.mask_token", "layernorm.weight", "layernorm.bias"))


def reach(task: Task) -> Outcome:
    """Cut to our parameter counts round by round, each followed by our trainings of that round."""
    rows, loaded = train_rows(task), checkpoint.load(task.teacher)
    cache, student = cache_of(task, loaded, rows), checkpoint.load(task.teacher).model
    done, notes = [], []
    for number, turn in enumerate(rounds_of(loaded.model.config, recipe_of(task, rows)), 1):
        student, share = smaller(student, loaded.model.config, turn.parameters)
        notes.append(f"round {number}: {share}/{PARTS} of widths and FFNs, {student.num_parameters():,} parameters")
        done += [
            trained(task, student, loaded.processor, rows, one, teacher=cache, number=number + 1000 * part)
            for part, one in enumerate(turn.trainings)
        ]
    save(task, student, loaded.processor, loaded.stored)
    return outcome(
        done,
        "torch-pruning",
        notes=tuple(notes),
        could_not=(
            "blocks: it cuts no depth, so the student keeps all 7 + 3",
            "key/value heads: under grouped queries only query heads go, and not down to one a group",
            "parameters that nothing reads (mask token and last norm of the vision tower): its graph does not reach them",
        ),
    )


def smaller(model: PreTrainedModel, whole: Any, most: int) -> tuple[PreTrainedModel, int]:
    """Return the model cut to the largest share of the teacher's sizes with at most `most` parameters, and that share."""
    for share in range(PARTS - 1, 0, -1):
        config = shape(whole, share)
        if config is not None and predict_parameters(config, {}) <= most:
            return cut(model, config), share
    raise UserError(f"torch-pruning: even 1/{PARTS} of the widths has more than {most:,} parameters.")


def shape(whole: Any, share: int) -> Any:
    """Return the teacher's configuration with `share` / `PARTS` of its widths, FFNs and heads; key/value heads stay.

    None where the stock class refuses it, because its query heads do not divide the width.
    """
    stored = whole.to_dict()
    text, vision = stored["text_config"], stored["vision_config"]
    groups = text["num_key_value_heads"]
    per_group = max(LEAST_QUERIES, round(text["num_attention_heads"] // groups * share / PARTS))
    text |= {
        "hidden_size": text["hidden_size"] * share // PARTS,
        "intermediate_size": text["intermediate_size"] * share // PARTS,
        "num_attention_heads": groups * per_group,
        "head_dim": HEAD_DIM,
    }
    vision |= {
        "hidden_size": vision["hidden_size"] * share // PARTS,
        "num_attention_heads": max(1, round(vision["num_attention_heads"] * share / PARTS)),
        "head_dim": HEAD_DIM,
    }
    return type(whole)(**stored) if text["hidden_size"] % text["num_attention_heads"] == 0 else None


def cut(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Let torch-pruning cut `model` (it is used up) to the sizes of `config`; return it as a stock model of that configuration.

    Raises:
        UserError: what it left has other shapes, or the stock model gives other logits.
    """
    model.set_attn_implementation("eager")  # its graph does not follow grouped queries through fused attention
    prompt = {**picture_prompt(model.config), "use_cache": False}
    heads, ratios = attention(model, config)
    pruner = tp.pruner.BasePruner(
        model,
        prompt,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1 - (config.text_config.hidden_size + 0.01) / model.config.text_config.hidden_size,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio_dict=ratios,
        ignored_layers=[model.get_output_embeddings()],
        output_transform=lambda found: found.logits,
    )
    pruner.step()
    told_heads(model, config)
    student: PreTrainedModel = stock_class(config).from_config(config, dtype=torch.float32)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    student.load_state_dict({**state, **{name: student.state_dict()[name] for name in UNUSED}})
    towers: Any = model.model
    towers.vision_tower.layernorm = torch.nn.Identity()  # it runs, at its old size, and nothing reads it
    with torch.no_grad():
        theirs, stock = model.eval()(**prompt).logits, student.eval()(**prompt).logits
    off = float((theirs - stock).abs().max() / theirs.abs().max())
    if off > 1e-3:
        raise UserError(f"torch-pruning: the stock model's logits are {off:.2g} of the largest away from what it left.")
    return student


def attention(model: PreTrainedModel, config: Any) -> tuple[dict[Any, int], dict[Any, float]]:
    """Return the heads of every query, key and value projection, and the share of heads that goes."""
    heads: dict[Any, int] = {}
    ratios: dict[Any, float] = {}
    for part, layer in layers_of(model):
        now, then = getattr(model.config, part), getattr(config, part)
        gone = 1 - then.num_attention_heads / now.num_attention_heads
        groups = now.num_key_value_heads if part == "text_config" else now.num_attention_heads
        heads |= {layer.q_proj: now.num_attention_heads, layer.k_proj: groups, layer.v_proj: groups}
        # it rounds the heads that go up
        ratios |= dict.fromkeys((layer.q_proj, layer.k_proj, layer.v_proj), max(0.0, gone - 1e-6))
    return heads, ratios


def layers_of(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return every attention module with the part of the configuration that it belongs to."""
    towers: Any = model.model
    return [("vision_config", layer.attention) for layer in towers.vision_tower.encoder.layer] + [
        ("text_config", layer.self_attn) for layer in towers.language_model.layers
    ]


def told_heads(model: PreTrainedModel, config: Any) -> None:
    """Write into the modules how many heads they have now, and into the configuration the FFN that rounding left."""
    for part, layer in layers_of(model):
        then = getattr(config, part)
        if part == "text_config":
            layer.num_key_value_groups = then.num_attention_heads // then.num_key_value_heads
        else:
            layer.num_attention_heads = then.num_attention_heads
    towers: Any = model.model
    config.text_config.intermediate_size = towers.language_model.layers[0].mlp.gate_proj.out_features
