"""Sizes that are cut one after another: in an order that works, to the sizes that were asked for, or refused."""

import io

import pytest
from rich.console import Console

from slimlmm import commands, evaluate, report
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.inspection import sizes_of
from slimlmm.resizing import resized
from slimlmm.views import ratio
from tiny import tiny_config
from zoo import CONFIGS


def test_evaluate_shows_the_error_over_pictures_as_the_report_does():
    score = evaluate.score([1, 1, 1, 0, 0, 0], list("aaabbb"))
    found = {"model": "m", "split": "test", "tasks": {}, "overall": score.model_dump()}
    (cell,) = commands.accuracy_table(found).columns[3].cells
    assert cell == f"{100 * score.clustered_se:.1f}" != f"{100 * score.se:.1f}"


def test_an_order_is_found_in_which_each_step_can_be_said():
    """40 channels are no multiple of the six heads that are there before the groups go."""
    found = commands.one_by_one(tiny_config("llava-clip-llama"), {"text.width": 40, "text.kv_groups": 2})
    assert list(found.items()) == [("text.kv_groups", 2), ("text.width", 40)]


def test_an_ffn_that_follows_the_width_does_not_end_at_another_size():
    config = tiny_config("llava-dinov2-llama")
    with pytest.raises(UserError, match=r"vision\.ffn"):
        commands.one_by_one(config, {"vision.ffn": 64, "vision.width": 16})
    found = commands.one_by_one(config, {"vision.width": 16, "vision.ffn": 32})
    assert describe(resized(resized(config, {"vision.width": 16}), {"vision.ffn": 32})).sizes["vision.ffn"] == 32
    assert found == {"vision.width": 16, "vision.ffn": 32}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("qwen3_vl_moe", {"text.experts": 1}, "a token takes 2 of them"),
        ("glm4v_moe", {"text.experts": 1}, "give 2 to 4"),
        ("blip-2-t5", {"text.blocks": 1}, "must not fall below num_decoder_layers = 2"),
    ],
)
def test_sizes_that_load_and_fail_to_answer_are_refused(name, sizes, message):
    with pytest.raises(UserError, match=message):
        resized(CONFIGS[name](), sizes)
    both = resized(CONFIGS["blip-2-t5"](), {"text.blocks": 1, "text.decoder_blocks": 1}).text_config
    assert (both.num_layers, both.num_decoder_layers) == (1, 1)


@pytest.mark.parametrize("width", [44, 448, 704, 832, 896])
def test_a_ratio_gives_the_neurons_back(width):
    for ffn in (60, *range(64, 4097, 64)):
        assert int(width * ratio(ffn, width)) == ffn


def test_odd_words_of_set_are_told():
    anatomy = describe(tiny_config("llava-clip-llama"))
    with pytest.raises(UserError, match="is not axis=size"):
        sizes_of(["text.ffn=²"], anatomy)
    with pytest.raises(UserError, match=r"text\.ffn is given twice"):
        sizes_of(["text.ffn=10", "text.ffn=20"], anatomy)


def test_a_task_that_looks_like_markup_is_shown_as_it_is():
    score = evaluate.score([1, 1, 1, 0, 0, 0], list("aaabbb")).model_dump()
    found = {"model": "[/m]", "split": "test", "tasks": {"a[/b]": score, "[bold]x": score}, "overall": score}
    text = io.StringIO()
    Console(file=text, width=100).print(commands.accuracy_table(found))
    assert all(part in text.getvalue() for part in ("[/m]: exact match", " a[/b] ", " [bold]x "))
    told = report.Table(head=("a",), rows=(("[/b]",),)).rich("[/t]")
    Console(file=text, width=100).print(told)
    assert "[/b]" in text.getvalue()
    assert "[/t]" in text.getvalue()
