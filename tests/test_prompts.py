"""Random inputs of a family: a picture is as large as asked for where the model takes any size."""

import pytest

from slimlmm.prompts import PICTURES, SIZED, picture_prompt
from zoo import CONFIGS


def values(batch) -> int:
    return sum(tensor.numel() for tensor in batch.values())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_larger_picture_has_more_to_say_where_any_size_is_taken(name):
    config = CONFIGS[name]()
    small, large = (picture_prompt(config, pixels=pixels) for pixels in (0, 448))
    any_size = PICTURES[config.model_type] in SIZED or config.vision_config.model_type == "pixtral"
    assert (values(large) > values(small)) is any_size
    assert (large["input_ids"].shape[1] > small["input_ids"].shape[1]) is any_size
