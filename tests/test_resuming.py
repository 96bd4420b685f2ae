"""Passes that begin later give what whole passes give, or begin at the beginning."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

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


def test_a_pass_that_begins_at_a_changed_block_gives_what_a_whole_pass_gives(sampled_family):
    model = random_model(CONFIGS[sampled_family]()).eval()
    few = [batch_of(model, seed) for seed in (0, 1)]
    memory = Memory.of(model, describe(model.config), few)
    assert bool(memory.order) is (sampled_family not in WHOLE)
    few_firsts = (
        dict.fromkeys(memory.order[number] for number in (1, len(memory.order) // 2, -1)) if memory.order else ()
    )
    for first in few_firsts:
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
        memory = Memory(memory.order)


class Counting(nn.Linear):
    """Counts how often it runs, and leaves the mean of its input on itself."""

    ran, left = 0, 0.0

    def forward(self, values):
        self.ran, self.left = self.ran + 1, float(values.detach().mean())
        return super().forward(values)


class Reading(nn.Linear):
    """Reads what another block left."""

    def forward(self, values):
        return super().forward(values) + self.of[0].left


class Toy(nn.Module):
    """Three blocks behind each other; the first one runs once for every picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Counting(4, 4), Counting(4, 4), nn.Linear(4, 4)])

    def forward(self, input_ids, pictures, use_cache=False):
        return self.blocks[2](self.blocks[1](torch.cat([self.blocks[0](picture) for picture in pictures])))


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
ANATOMY = SimpleNamespace(axes={"vision.blocks": SimpleNamespace(layers="blocks")})


def toy_batch(seed, pictures=1):
    rng = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.tensor([[seed]]), "pictures": list(torch.randn(pictures, 2, 4, generator=rng))}


def run(model, batch):
    with torch.no_grad():
        return model(**batch)


def test_each_picture_of_a_batch_gets_its_own():
    model, few = Toy(), [toy_batch(0), toy_batch(1, pictures=3)]
    wanted = [run(model, batch) for batch in few]
    memory = Memory.of(model, ANATOMY, few[:1])
    assert memory.order == BLOCKS
    for _ in range(2):
        with memory.resumed(model, "blocks.2"):
            assert all(torch.equal(run(model, batch), one) for batch, one in zip(few, wanted, strict=True))


def test_what_a_block_leaves_on_itself_for_others_is_noticed():
    model = Toy()
    model.blocks[2] = Reading(4, 4)
    model.blocks[2].of = [model.blocks[0]]
    assert Memory.of(model, ANATOMY, [toy_batch(0)]).order, "one batch cannot tell"
    assert Memory.of(model, ANATOMY, [toy_batch(0), toy_batch(1)]).order == ()


def test_a_model_cannot_be_copied_meanwhile_and_is_as_it_was_afterwards():
    model, memory = Toy(), Memory(BLOCKS)
    with pytest.raises(RuntimeError, match=r"copied while blocks\.0 hands out"), memory.resumed(model, "blocks.1"):
        copy.deepcopy(model)
    assert not any("forward" in block.__dict__ for block in model.blocks)
    assert not model._forward_pre_hooks


def test_passes_with_gradients_are_whole():
    model, memory, batch = Toy(), Memory(BLOCKS), toy_batch(0)
    with memory.resumed(model, "blocks.2"):
        run(model, batch)
        model(**batch).sum().backward()
    assert all(float(block.weight.grad.abs().sum()) > 0 for block in model.blocks)


@pytest.mark.parametrize("writes", [False, True])
def test_what_was_written_into_is_not_handed_out(writes):
    model, memory, batch = Toy(), Memory(BLOCKS), toy_batch(0)
    if writes:
        model.blocks[2].register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(2.0),))
    wanted = run(model, batch)
    for _ in range(2):
        with memory.resumed(model, "blocks.2"):
            assert torch.equal(run(model, batch), wanted)
    assert model.blocks[1].ran == (3 if writes else 2)


def test_no_more_is_remembered_than_there_is_room_for():
    model, few = Toy(), [toy_batch(seed) for seed in range(4)]
    wanted = [run(model, batch) for batch in few]
    memory = Memory(BLOCKS, most_bytes=3 * wanted[0].nbytes)
    for _ in range(2):
        with memory.resumed(model, "blocks.2"):
            assert all(torch.equal(run(model, batch), one) for batch, one in zip(few, wanted, strict=True))
    assert model.blocks[0].ran + model.blocks[1].ran == 8 + 8 + 5


def test_half_precision_has_its_own():
    model, memory, batch = Toy(), Memory(BLOCKS), toy_batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = run(model, batch)
    wanted = run(model, batch)
    for _ in range(2):
        with memory.resumed(model, "blocks.2"):
            assert torch.equal(run(model, batch), wanted)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(run(model, batch), half)
    assert not torch.equal(half.float(), wanted)
