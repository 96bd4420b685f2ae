import itertools

import pytest

from slimlmm import budget, plan
from slimlmm.anatomy import describe
from slimlmm.resizing import most_parameters, predict_parameters
from tiny import NAMES, tiny_config
from zoo import CONFIGS

#: model types whose blocks differ in size
UNEQUAL = ("qwen3_5", "glm4v_moe", "llama4_moe", "lfm2_vl", "gemma4")


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_most_parameters_are_those_of_the_largest_blocks_that_may_stay(name, share):
    config = CONFIGS[name]()
    anatomy = describe(config)
    ffn, axis = anatomy.axis("text.ffn"), anatomy.axis("text.blocks")
    (group,) = axis.groups
    for size in axis.choices():
        sizes = {"text.blocks": size, "text.ffn": min(ffn.choices(), key=lambda one: abs(one - share * ffn.size))}
        kept = filter(group.allows, itertools.combinations(range(group.units), group.kept(size)))
        counts = [predict_parameters(config, sizes, {"text.blocks": units}) for units in kept]
        assert most_parameters(config, sizes) == max(counts)


@pytest.mark.parametrize("name", NAMES)
def test_equal_blocks_leave_as_many_parameters_whichever_stay(name):
    config = tiny_config(name)
    sizes = {name: axis.choices()[0] for name, axis in describe(config).axes.items() if axis.kind == "blocks"}
    assert most_parameters(config, sizes) == predict_parameters(config, sizes)


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_budget_is_kept_whichever_blocks_stay(name):
    config = CONFIGS[name]()
    whole = predict_parameters(config, {})
    space = plan.space_of(config)
    stated = space.stated(plan.sizes_within(space, budget.by_shrink(config, 2.0, whole)))
    (group,) = describe(config).axis("text.blocks").groups
    for units in itertools.combinations(range(group.units), group.kept(stated["text.blocks"])):
        if group.allows(units):
            assert predict_parameters(config, stated, {"text.blocks": units}) <= whole / 2.0
