"""Fewer query tokens, fewer placeholders: the cut folder answers a picture through its own processor."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from slimlmm import commands, processors
from slimlmm.errors import UserError
from tiny import tiny


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny("blip2-opt")
    processor.image_token = "<image>"
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    settings = tmp_path / "whole" / processors.SETTINGS
    assert json.loads(settings.read_text())["num_query_tokens"] == 4
    return tmp_path / "whole"


def test_the_cut_folder_answers_a_picture(folder, tmp_path):
    found = commands.cut(str(folder), tmp_path / "small", ["qformer.query_tokens=2", "text.ffn=32"])
    assert found["sizes"] == {"qformer.query_tokens": 2, "text.ffn": 32}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "small").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "small")
    assert (model.config.num_query_tokens, processor.num_query_tokens) == (2, 2)
    batch = processor(images=Image.new("RGB", (28, 28), "red"), text="What is shown?", return_tensors="pt")
    assert int((batch["input_ids"] == model.config.image_token_index).sum()) == 2
    with torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=3, min_new_tokens=1, do_sample=False)
    assert answer.shape[1] > 0


def test_a_processor_that_does_not_say_the_number_is_refused(folder, tmp_path):
    settings = folder / processors.SETTINGS
    left = {key: value for key, value in json.loads(settings.read_text()).items() if key != "num_query_tokens"}
    settings.write_text(json.dumps(left))
    with pytest.raises(UserError, match=r"does not say num_query_tokens"):
        commands.cut(str(folder), tmp_path / "small", ["qformer.query_tokens=2"])
    assert not (tmp_path / "small").exists()


def test_criteria_that_run_the_model_do_not_score_query_tokens(folder, tmp_path, ads):
    with pytest.raises(UserError, match="cut it by magnitude"):
        commands.cut(str(folder), tmp_path / "small", ["qformer.query_tokens=2"], criterion="taylor", source=ads)
