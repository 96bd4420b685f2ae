"""Passes that begin later give what whole passes give, or begin at the beginning."""

import copy

import pytest
import torch

from slimlmm.anatomy import describe
from slimlmm.forward import answer_logits
from slimlmm.prompts import picture_prompt
from slimlmm.resuming import Memory
from slimlmm.selfcheck import random_model
from zoo import CONFIGS

#: models whose blocks leave more behind than they return, or run more than once: their passes begin at the beginning
WHOLE = ("gemma4",)


def batch_of(model, seed):
    """Return a picture prompt whose answer is every position."""
    batch = picture_prompt(model.config, seed)
    with torch.no_grad():
        positions = model(**batch, use_cache=False).logits.shape[:2]
    return batch | {"shift_labels": torch.zeros(positions, dtype=torch.long)}


@torch.no_grad()
def logits(model, batch):
    return answer_logits(model, batch)[0]


def ran(model, names):
    """Return the list that collects which blocks run."""
    found = []
    for name in names:
        inner = next(part for part in model.get_submodule(name).modules() if isinstance(part, torch.nn.Linear))
        inner.register_forward_hook(lambda *_, name=name: found.append(name))
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pass_that_begins_at_a_changed_block_gives_what_a_whole_pass_gives(family):
    model = random_model(CONFIGS[family]()).eval()
    few = [batch_of(model, seed) for seed in (0, 1)]
    memory = Memory.of(model, describe(model.config), few[0])
    assert bool(memory.order) is (family not in WHOLE)
    for first in memory.order[1:]:
        with memory.resumed(model, first):
            for batch in few:
                logits(model, batch)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in changed.get_submodule(first).parameters():
                parameter.mul_(1.5)
        wanted, blocks = [logits(changed, batch) for batch in few], ran(changed, memory.order)
        with memory.resumed(changed, first):
            found = [logits(changed, batch) for batch in few]
        assert first in blocks
        assert not set(blocks) & set(memory.order[: memory.order.index(first)])
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        memory.forget(memory.order[0])
