"""What the rounds of a run share."""

from dataclasses import replace

import torch
from transformers import LlavaConfig

from slimlmm import checkpoint, recipe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.job import Handed, job_of
from slimlmm.progress import Quiet
from slimlmm.runfolder import RunFolder
from slimlmm.selfcheck import random_model
from slimlmm.teacher import TeacherCache
from tiny import tiny, tiny_config

SETTINGS = {
    "data": {"calibration_rows": 20, "validation_rows": 20},
    "stages": [{"name": "inner", "rounds": [{"sizes": {"text.ffn": 32}}]}],
}


def test_the_teacher_says_of_every_row_what_it_says_of_that_row_alone(rows, tmp_path):
    _, processor = tiny("llava-dinov2-llama")
    config = tiny_config("llava-dinov2-llama").to_dict()
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 60}
    teacher = random_model(LlavaConfig(**config)).eval()
    checkpoint.save(teacher, processor, tmp_path / "teacher")
    short = by_picture([replace(row, question="Red?", answer="a") for row in rows.train], 16)

    def job(groups):
        train = [row for group in groups for row in group]
        folder = RunFolder(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        folder.path.mkdir()
        return job_of(
            folder, recipe.parse(SETTINGS, "r.yaml"), {"train": train, "validation": rows.validation}, Quiet()
        )

    seen = {row.picture_key() for row in job(short).calibration}
    at = next(number for number, group in enumerate(short) if group[0].picture_key() not in seen)
    long = [replace(row, question="What does it say, word by word? " * 3) for row in short[at]]
    asked = job([*short[:at], long, *short[at + 1 :]])
    asked.teacher = Handed.of(checkpoint.load(tmp_path / "teacher"))
    asked.ask()
    alone = TeacherCache(teacher, Collator(processor, packed=False), tmp_path / "alone")
    batch = Collator(processor, packed=False)([long])
    assert torch.allclose(asked.cache.logits(asked.cache.of(batch)), alone.logits(alone.of(batch)), atol=2e-2)
