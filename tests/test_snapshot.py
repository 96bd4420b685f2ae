from slimlmm import checkpoint
from slimlmm.snapshot import identity_of


def test_an_identity_knows_where_splits_end_and_what_the_checkpoint_says(teacher, rows):
    loaded = checkpoint.load(teacher)
    told = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    first = identity_of(loaded, told)
    assert identity_of(checkpoint.load(teacher), told) == first
    moved = told | {"validation": rows.validation[:-1], "test": [rows.validation[-1], *rows.test]}
    other = identity_of(loaded, moved)
    assert {key for key in first if first[key] != other[key]} == {"rows"}
    loaded.processor.chat_template += " "
    assert {key for key, value in identity_of(loaded, told).items() if value != first[key]} == {"rules"}
    again = checkpoint.load(teacher)
    again.model.generation_config.max_length = 77
    assert {key for key, value in identity_of(again, told).items() if value != first[key]} == {"rules"}
