"""How answers are decoded: what ends them, and that nothing else of a checkpoint is heard."""

import pytest
import torch

from slimlmm import checkpoint, distill
from slimlmm.collate import Prompter
from slimlmm.decoding import ends_of, generation_settings
from slimlmm.evaluate import answer
from slimlmm.trainings import Training
from tiny import tiny


@pytest.mark.parametrize(("told", "ends"), [(None, 1), (1, 1), (5, [5, 1]), ([5, 7], [5, 7, 1]), ([1, 5], [1, 5])])
def test_an_answer_ends_where_the_checkpoint_says_and_where_it_was_taught_to(told, ends):
    model, processor = tiny("llava-dinov2-llama")
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(1)
    model.generation_config.eos_token_id = told
    assert ends_of(model, processor.tokenizer) == ends
    settings = generation_settings(model, processor, 4)
    assert settings["eos_token_id"] == ends
    assert settings["pad_token_id"] is not None


def test_a_model_that_was_taught_to_end_stops_there_by_stock_generation_too(tmp_path, rows):
    model, processor = tiny("llava-dinov2-llama")
    other = processor.tokenizer.convert_tokens_to_ids("a")
    assert other != processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = other
    some = rows.train[:4]
    settings = Training(steps=60, pictures_per_step=4, learning_rate=3e-3, losses={"cross_entropy": 1.0})
    distill.train(model, processor, some, settings, tmp_path / "training")
    assert model.generation_config.eos_token_id == [other, processor.tokenizer.eos_token_id]
    checkpoint.save(model, processor, tmp_path / "model")
    stock = checkpoint.load(tmp_path / "model").model
    assert stock.generation_config.eos_token_id == [other, processor.tokenizer.eos_token_id]
    wanted = [Prompter(processor).answer_ids(row) for row in some]
    limit = max(map(len, wanted)) + 4
    texts = answer(model.eval(), processor, some, limit)
    taught = [other not in ids for ids in wanted]
    assert any(taught)
    for row, text, whole in zip(some, texts, taught, strict=True):
        assert not whole or text == row.answer
    assert torch.is_inference_mode_enabled() is False
