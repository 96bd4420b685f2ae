"""What repairs and scores make of rows does not depend on how far the batch is padded."""

import copy

import pytest
import torch

from slimlmm import bridging, data, importance, merging, plan, repair, settling, surgery
from slimlmm.anatomy import describe
from slimlmm.calibration import calibration_of
from slimlmm.collate import IGNORE, Collator, real_tokens
from slimlmm.forward import answer_logits
from tiny import tiny

MORE = 60


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "apart"])
def case(request, rows):
    """A model whose padding token has a vector, with batches, and the same ones with more padding."""
    model, processor = tiny("llava-dinov2-llama")
    pad = processor.tokenizer.pad_token_id
    with torch.no_grad():
        vectors = model.get_input_embeddings().weight
        vectors[pad] = vectors[10]
    collator = Collator(processor, packed=request.param)
    batches = list(calibration_of(data.spread(rows.train, 24, 2, 1), collator, torch.device("cpu")).fit)
    more = [longer(batch, pad) for batch in batches]
    for one, other in zip(batches, more, strict=True):
        assert torch.allclose(answer_logits(model, one)[0], answer_logits(model, other)[0], atol=1e-5)
        assert torch.equal(real_tokens(one), real_tokens(other)[:, :-MORE])
        assert not real_tokens(other)[:, -MORE:].any()
    return model, batches, more


def longer(batch, pad):
    """The batch with `MORE` columns of padding, as the collator makes them."""
    found, (count, length) = dict(batch), batch["input_ids"].shape
    found["input_ids"] = torch.cat((batch["input_ids"], torch.full((count, MORE), pad)), 1)
    found["shift_labels"] = torch.cat((batch["shift_labels"], torch.full((count, MORE), IGNORE)), 1)
    found["picture_tokens"] = torch.cat((batch["picture_tokens"], torch.zeros(count, MORE, dtype=torch.bool)), 1)
    mask = batch["attention_mask"]
    if mask.dim() == 2:
        found["attention_mask"] = torch.cat((mask, torch.zeros(count, MORE, dtype=mask.dtype)), 1)
        return found
    size = length + MORE
    whole, rest = torch.full((count, 1, size, size), torch.finfo(torch.float32).min), torch.arange(length, size)
    whole[:, :, :length, :length] = mask
    whole[:, 0, rest, rest] = 0
    positions = torch.cat((batch["position_ids"], torch.zeros(count, MORE, dtype=torch.long)), 1)
    return found | {"attention_mask": whole, "position_ids": positions}


def kept(model, axis, size):
    anatomy = describe(model.config)
    return plan.choose(importance.score(model, anatomy, [axis], "magnitude"), anatomy, axis, size)


def refitted(model, batches):
    anatomy, trial, keep = describe(model.config), copy.deepcopy(model), kept(model, "text.ffn", 40)
    repair.fold(trial, anatomy, "text.ffn", keep, repair.collect(model, anatomy, "text.ffn", batches))
    return trial


def stream_of(model, batches):
    """What a rotation of the residual stream is made from."""
    found = repair.collect(model, describe(model.config), "text.width", batches)
    return torch.stack([one.gram() for one in found.stream.moments.values()])


def settled(model, batches):
    student = surgery.cut(model, describe(model.config), "text.ffn", kept(model, "text.ffn", 40))
    assert settling.settled(student, model, {}, batches)
    return student


def bridged(model, batches):
    trial, axis = copy.deepcopy(model), "text.blocks"
    assert bridging.bridged(trial, describe(model.config), axis, {axis: torch.tensor([0, 2])}, batches)
    return trial


def merged(model, batches):
    trial, axis = copy.deepcopy(model), "text.kv_groups"
    merging.merge(trial, describe(model.config), axis, kept(model, axis, 2), batches)
    return trial


@pytest.mark.parametrize("way", [refitted, settled, bridged, merged])
def test_repairs_do_not_see_padding(case, way):
    model, batches, more = case
    one, other = way(model, batches), way(model, more)
    for (name, found), wanted in zip(other.named_parameters(), one.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.detach().abs().max())), name


def test_rotations_and_scores_do_not_see_padding(case):
    model, batches, more = case
    one, other = stream_of(model, batches), stream_of(model, more)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    anatomy = describe(model.config)
    scores = [importance.score(model, anatomy, ["text.ffn"], "activation", some) for some in (batches, more)]
    for name, wanted in scores[0].items():
        assert torch.allclose(scores[1][name], wanted, rtol=1e-4)
