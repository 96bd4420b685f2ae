"""What a user does, with the stock processors of families that place pictures in ways of their own."""

import copy
from importlib.util import find_spec

import pytest
import torch

from slimlmm import evaluate as ev
from slimlmm.collate import Collator, texts_of
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.families import FAMILIES
from slimlmm.forward import answer_logits
from slimlmm.packing import can_pack
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from slimlmm.vocab import trim
from stock import BUILDERS, stock

LACKING = pytest.mark.skipif(find_spec("torchvision") is None, reason="PixtralProcessor needs torchvision")
CASES = [pytest.param(name, marks=[LACKING] if name in ("mistral3", "llava-pixtral") else []) for name in BUILDERS]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return (*stock(request.param), FAMILIES[stock(request.param)[0].config.model_type])


def test_collated_rows_give_the_logits_of_the_models_own_forward(case, rows):
    model, processor, _ = case
    if model.config.model_type == "paligemma":
        pytest.skip("sees a text whole unless it is told which part is the answer; test_collate holds that")
    group = by_picture(rows.train, 3)[0]
    collator = Collator(processor, packed=False)
    batch = collator([group])
    with torch.inference_mode():
        found_AV, labels_A, _ = answer_logits(model, batch)
        wanted, texts = [], [collator.prompter.turns(row.question, row.answer) for row in group]
        for row, (prompt, answer) in zip(group, texts, strict=True):
            inputs = processor(text=[prompt + answer], images=[[row.open()]], return_tensors="pt")
            count = len(collator.prompter.answer_ids(row))
            wanted.append(model(**inputs, use_cache=False).logits[0, -count - 1 : -1])
    assert len(labels_A) == len(found_AV)
    assert torch.allclose(found_AV, torch.cat(wanted), atol=2e-4 * float(found_AV.abs().max()))


def test_the_places_of_a_picture_are_those_that_the_model_fills(case, rows):
    model, processor, family = case
    batch = Collator(processor, packed=False)(by_picture(rows.train, 2)[:2])
    marked = batch["picture_tokens"].sum(1)
    assert (marked == 1).all() if family.beside else (marked >= 4).all()
    assert (batch["input_ids"][batch["picture_tokens"]] == model.config.image_token_id).all()


@pytest.mark.parametrize(("pictures", "each"), [(1, 3), (2, 2)])
def test_one_look_at_a_picture_gives_the_answers_of_looking_each_time(case, rows, pictures, each):
    model, processor, _ = case
    asked = [row for group in by_picture(rows.train, 16)[:pictures] for row in group[:each]]
    alone = [ev.answer(model, processor, [row], 5)[0] for row in asked]
    assert ev.evaluate(model, processor, asked, max_new_tokens=5).answers == [ev.normalise(text) for text in alone]


def test_a_model_distilled_from_itself_has_nothing_to_learn(case, rows, tmp_path):
    model, processor, family = case
    few = [row for group in by_picture(rows.train, 4)[:6] for row in group[:2]]
    packed = can_pack(model, processor, few)
    cache = TeacherCache(copy.deepcopy(model), Collator(processor, packed=packed), tmp_path / "cache")
    losses = {"forward_kl": 1.0, "block_states": 1.0} | ({} if family.beside else {"picture_states": 1.0})
    settings = Training(
        steps=1, pictures_per_step=3, losses=losses, log_every=1, precision="float32", learning_rate=1e-9
    )
    found = train(model, processor, few, settings, tmp_path, teacher=cache)
    assert abs(found.history[0]["loss/block_states"]) < 1e-6
    assert abs(found.history[0]["loss"]) < 2e-2  # states come back in half precision, pictures' through a fitted map


def test_tokens_that_a_processor_writes_itself_stay(case, rows):
    model, processor, _ = case
    student, trimmed = trim(model, processor, texts_of(processor, rows.train))
    prompt = Collator(processor, packed=False).prompter.prompt(rows.train[0].question)
    given = [one(text=[prompt], images=[[rows.train[0].open()]], return_tensors="pt") for one in (processor, trimmed)]
    assert given[0]["input_ids"].shape == given[1]["input_ids"].shape
    ids = processor.tokenizer.convert_tokens_to_ids(
        trimmed.tokenizer.convert_ids_to_tokens(range(len(trimmed.tokenizer)))
    )
    ids = [one for one in ids if one < model.get_output_embeddings().weight.shape[0]]
    with torch.inference_mode():
        wanted, found = model(**given[0]).logits[..., ids], student(**given[1]).logits[..., : len(ids)]
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_processors_that_cannot_be_asked_say_so(rows):
    class Kosmos2Processor:
        tokenizer = stock("paligemma")[1].tokenizer

    with pytest.raises(UserError, match="every place of a picture has a token of its own"):
        Collator(Kosmos2Processor(), packed=False)
