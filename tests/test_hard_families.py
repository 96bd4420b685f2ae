"""Families whose facts are of a kind of their own: each fact is held against the masked model at every legal choice."""

import itertools

import pytest
import torch

from slimlmm import surgery
from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.importance import score
from slimlmm.probing import edited, skeleton
from slimlmm.prompts import picture_prompt
from slimlmm.resizing import predict_parameters, resized
from slimlmm.selfcheck import random_model, self_check, some_units
from slimlmm.surgery import cut, masked
from slimlmm.vocab import closed_tokens, trim
from slimlmm.wiring import NotRotatable, trace
from tiny import tiny_tokenizer
from zoo import CONFIGS

TOLERANCE = 1e-5
GEMMA4 = ("gemma4", "gemma4-dense", "gemma4-moe")


def gap(model, axis, keep, batch) -> float:
    """Largest |cut - masked| over the largest |logit|, having checked the number of parameters."""
    anatomy = describe(model.config)
    with torch.no_grad():
        student = cut(model, anatomy, axis, keep)
        got = student(**batch).logits
        with masked(model, anatomy, axis, keep):
            wanted = model(**batch).logits
    size = anatomy.axis(axis).size
    kind = anatomy.axis(axis).kind
    blocks = {name: units.tolist() for name, units in keep.items()} if kind == "blocks" else None
    group = anatomy.axis(axis).groups[0]
    size = len(keep[group.name]) * group.stride // group.rate
    assert sum(p.numel() for p in student.parameters()) == predict_parameters(model.config, {axis: size}, blocks)
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma4_keeps_any_blocks_that_hold_what_others_read(name):
    model = random_model(CONFIGS[name]())
    batch = picture_prompt(model.config)
    group = describe(model.config).group("text.blocks")
    for count in range(group.least, group.units):
        for kept in itertools.combinations(range(group.units), count):
            if group.allows(kept):
                assert gap(model, "text.blocks", {"text.blocks": torch.tensor(kept)}, batch) <= TOLERANCE, kept
            else:
                with pytest.raises(UserError, match="one unit must stay"):
                    gap(model, "text.blocks", {"text.blocks": torch.tensor(kept)}, batch)


def test_gemma4_keeps_any_experts_with_the_scale_of_each():
    model = random_model(CONFIGS["gemma4-moe"]())
    batch, axis = picture_prompt(model.config), describe(model.config).axis("text.experts")
    for layer in range(model.config.text_config.num_hidden_layers):
        router = model.get_submodule(f"model.language_model.layers.{layer}.router")
        torch.nn.init.uniform_(router.per_expert_scale, 0.5, 2.0)
    assert axis.choices() == (2, 3, 4)
    for size in axis.choices():
        for seed in (0, 1):
            assert gap(model, axis.name, some_units(axis, size, seed), batch) <= TOLERANCE, (size, seed)


def test_gemma4_rewrites_all_that_counts_blocks():
    model = random_model(CONFIGS["gemma4"]())
    student = cut(model, describe(model.config), "text.blocks", {"text.blocks": torch.tensor([1, 2, 4, 5])})
    text = student.config.to_dict()["text_config"]
    assert text["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert text["num_kv_shared_layers"] == 2
    assert text["per_layer_config"] == {"1": {"head_dim": 20}, "3": {"head_dim": 20}}
    rows = model.model.language_model.embed_tokens_per_layer.weight.unflatten(1, (6, 14))
    assert torch.equal(
        student.model.language_model.embed_tokens_per_layer.weight, rows[:, [1, 2, 4, 5]].flatten(1).detach()
    )


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma4_heads_go_in_every_block_by_its_own_number_of_groups(name):
    model = random_model(CONFIGS[name]())
    batch = picture_prompt(model.config)
    axis = describe(model.config).axis("text.kv_groups")
    for size in axis.choices()[:-1]:
        for seed in range(3):
            assert gap(model, axis.name, some_units(axis, size, seed), batch) <= TOLERANCE


def test_gemma4_blocks_that_share_keys_share_the_choice_of_heads():
    axis = describe(CONFIGS["gemma4"]()).axis("text.kv_groups")
    assert [group.name for group in axis.groups] == [f"text.kv_groups[{layer}]" for layer in (0, 1, 2)]
    layers = [{int(slot.parameter.split(".")[3]) for slot in group.slots} for group in axis.groups]
    assert layers == [{0}, {1, 3, 4}, {2, 5}]
    dense = describe(CONFIGS["gemma4-dense"]()).axis("text.kv_groups")
    assert [(group.units, group.stride) for group in dense.groups] == [(4, 1), (2, 2)] * 2
    assert dense.choices() == (2, 4)


@pytest.mark.parametrize("name", GEMMA4)
@pytest.mark.parametrize("axis_name", ["text.width", "vision.width"])
def test_gemma4_widths_are_exact_with_bounds_that_bite(name, axis_name):
    """Clipped linears clip for real, and standardisation is not the identity."""
    model = random_model(CONFIGS[name]())
    for key, buffer in model.named_buffers():
        if key.endswith(("_min", "_max")):
            buffer.fill_(1.5 if key.endswith("_max") else -1.2)
    batch = picture_prompt(model.config)
    axis = describe(model.config).axis(axis_name)
    for size in axis.choices()[7::9]:
        assert gap(model, axis_name, some_units(axis, size), batch) <= TOLERANCE, size


def test_gemma4_blocks_can_be_scored_with_their_embeddings():
    model = random_model(CONFIGS["gemma4"]())
    anatomy, batch = describe(model.config), picture_prompt(model.config)
    for criterion in ("magnitude", "activation", "random"):
        scores = score(model, anatomy, ["text.blocks"], criterion=criterion, batches=[batch])
        assert len(scores["text.blocks"]) == 6
    model = random_model(CONFIGS["gemma4-dense"]())
    scores = score(model, describe(model.config), ["vision.width"], criterion="magnitude", batches=[batch])
    assert len(scores["vision.width"]) == 32


def test_patches_are_merged_behind_the_same_blocks():
    model = random_model(CONFIGS["minicpmv4_6"]())
    batch = picture_prompt(model.config)
    anatomy = describe(model.config)
    assert anatomy.group("vision.blocks").some_of == ((0, 1), (0, 1))
    where = {(1,): 0, (0, 3): 0, (0, 1, 2): 1, (1, 2, 3): 0}
    for kept, number in where.items():
        keep = {"vision.blocks": torch.tensor(kept)}
        assert gap(model, "vision.blocks", keep, batch) <= TOLERANCE, kept
        config = cut(model, anatomy, "vision.blocks", keep).config
        assert (config.insert_layer_id, config.vision_config.insert_layer_id) == (number, number)
    with pytest.raises(UserError, match="one unit must stay"):
        cut(model, anatomy, "vision.blocks", {"vision.blocks": torch.tensor([2, 3])})


def test_a_placeholder_behind_the_vocabulary_stays_right_behind_it():
    """Mllama: 8 rows more in the table than in the head; the picture's token is the first of them."""
    tokenizer = tiny_tokenizer(("<|image|>",))
    size = len(tokenizer) - 1
    changes = {("text_config", "vocab_size"): size, ("", "image_token_index"): size}
    model = random_model(edited(CONFIGS["mllama"](), changes))
    student, trimmed = trim(model, tokenizer, ["Which brand is shown?"])
    small = len(trimmed) - 1
    assert small < size
    assert student.config.image_token_index == trimmed.convert_tokens_to_ids("<|image|>") == small
    table = "model.language_model.embed_tokens.weight"
    assert torch.equal(student.get_parameter(table)[small:], model.get_parameter(table)[size:])
    assert student.lm_head.weight.shape[0] == small
    batch = picture_prompt(model.config)
    batch["input_ids"] = tokenizer("<|image|>Which brand is shown?", return_tensors="pt")["input_ids"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["cross_attention_mask"] = batch["cross_attention_mask"][:, :1].repeat(1, batch["input_ids"].shape[1], 1, 1)
    again = batch | {"input_ids": trimmed("<|image|>Which brand is shown?", return_tensors="pt")["input_ids"]}
    ids = tokenizer.convert_tokens_to_ids(trimmed.convert_ids_to_tokens(range(small)))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[..., ids], student(**again).logits)


def test_placeholders_with_gaps_cannot_be_renumbered():
    tokenizer = tiny_tokenizer(("<|image|>", "<|other|>"))
    size = len(tokenizer) - 3
    changes = {("text_config", "vocab_size"): size, ("", "image_token_index"): size}
    model = random_model(edited(CONFIGS["mllama"](), changes))
    kept = set(closed_tokens(tokenizer, ["Which"]))
    assert size not in kept
    with pytest.raises(UserError, match="behind the vocabulary"):
        trim(model, tokenizer, ["Which"])


def test_positions_counted_from_the_padding_token_stay():
    """Kosmos-2: the first position is the id of the padding token plus one, so all ids up to it stay what they are."""
    model = random_model(CONFIGS["kosmos-2"]())
    anatomy = describe(model.config)
    assert anatomy.axis("vocab").choices()[0] == model.config.text_config.pad_token_id + 1 == 4
    student = cut(model, anatomy, "vocab", {"vocab": torch.arange(10)})
    assert student.config.text_config.pad_token_id == 3
    with pytest.raises(UserError, match="one unit must stay"):
        cut(model, anatomy, "vocab", {"vocab": torch.tensor([0, 2, 3, 4, 5])})


def test_llama4_holds_its_ffn_to_the_width():
    model = random_model(CONFIGS["llama4"]())
    axis = describe(model.config).axis("vision.width")
    student = cut(model, describe(model.config), axis.name, some_units(axis, 16))
    assert student.config.vision_config.intermediate_size == 16 * 4
    assert describe(student.config).axis("vision.width").size == 16
    with pytest.raises(UserError, match=r"goes with vision\.width"):
        describe(model.config).axis("vision.ffn")
    for size in axis.choices()[:-1]:
        assert gap(model, axis.name, some_units(axis, size), picture_prompt(model.config)) <= TOLERANCE


def test_t5_heads_are_one_choice_for_all_that_share_a_position_bias():
    model = random_model(CONFIGS["blip-2-t5"]())
    anatomy, batch = describe(model.config), picture_prompt(model.config)
    axis = anatomy.axis("text.kv_groups")
    assert [group.name for group in axis.groups if group.layer is None] == [
        "text.kv_groups.encoder",
        "text.kv_groups.decoder",
        "text.kv_groups[decoder.0]",
        "text.kv_groups[decoder.1]",
    ]
    owners = {
        slot.parameter: group.name
        for group in axis.groups
        for slot in group.slots
        if slot.parameter.endswith("relative_attention_bias.weight")
    }
    assert sorted(owners.values()) == ["text.kv_groups.decoder", "text.kv_groups.encoder"]
    assert {slot.parameter.split(".")[6] for slot in anatomy.group("text.kv_groups[decoder.0]").slots} == {
        "EncDecAttention"
    }
    for size in axis.choices()[:-1]:
        for seed in range(2):
            assert gap(model, axis.name, some_units(axis, size, seed), batch) <= TOLERANCE, (size, seed)


def test_encoder_and_decoder_of_florence2_each_lose_heads_of_their_own_size():
    model = random_model(CONFIGS["florence2"]())
    axis = describe(model.config).axis("text.width")
    heads = {(group.units, group.stride) for group in axis.groups if group.name.endswith("heads")}
    assert heads == {(6, 8), (4, 12)}
    assert axis.choices() == (24, 48)
    keep = some_units(axis, 24)
    text = cut(model, describe(model.config), axis.name, keep).config.text_config
    assert (text.d_model, text.encoder_attention_heads, text.decoder_attention_heads) == (24, 3, 2)
    assert gap(model, axis.name, keep, picture_prompt(model.config)) <= TOLERANCE
    same = edited(model.config, {("text_config", "decoder_attention_heads"): 6})
    other = random_model(same)
    for size in describe(same).axis("text.width").choices()[:-1]:
        keep = some_units(describe(same).axis("text.width"), size)
        assert gap(other, axis.name, keep, picture_prompt(same)) <= TOLERANCE, size


def test_the_side_of_janus_that_draws_pictures_is_cut_as_it_is_masked():
    model = random_model(CONFIGS["janus"]())
    anatomy = describe(model.config)
    keep = some_units(anatomy.axis("text.width"), 24)
    student = cut(model, anatomy, "text.width", keep)
    codes = torch.tensor([[1, 5, 20]])

    def drawn(any_model) -> torch.Tensor:
        states = any_model.prepare_embeddings_for_image_generation(codes)
        return any_model.model.generation_head(any_model.model.language_model(inputs_embeds=states).last_hidden_state)

    with torch.no_grad():
        with masked(model, anatomy, "text.width", keep):
            wanted = drawn(model)
        got = drawn(student)
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        assert (drawn(model) - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("name", [*GEMMA4, "minicpmv4_6", "llama4", "blip-2-t5", "florence2"])
def test_joint_changes_count_as_the_rebuilt_model(name):
    """All axes at once: settings by block number follow both the heads and the blocks."""
    config = CONFIGS[name]()
    axes = [axis for axis in describe(config).axes.values() if not axis.refusal]
    for share in (3, 2):
        sizes = {axis.name: axis.choices()[len(axis.choices()) // share] for axis in axes}
        if name == "blip-2-t5":
            del sizes["text.blocks"]
        new = resized(config, sizes)
        assert predict_parameters(config, sizes) == skeleton(new).parameters
        assert {axis: size for axis, size in describe(new).sizes.items() if axis in sizes} == sizes


@pytest.mark.parametrize("name", GEMMA4)
def test_a_chain_of_cuts_is_the_resized_model_and_generates(name):
    model = random_model(CONFIGS[name]())
    batch = picture_prompt(model.config)
    for axis_name in ("text.kv_groups", "text.blocks", "text.width", "vision.width", "vision.blocks", "text.kv_groups"):
        axis = describe(model.config).axis(axis_name)
        sizes = [size for size in axis.choices() if size < axis.size]
        if sizes:
            keep = some_units(axis, sizes[-1])
            assert gap(model, axis_name, keep, batch) <= TOLERANCE
            model = cut(model, describe(model.config), axis_name, keep)
    answer = model.generate(**batch, max_new_tokens=3, min_new_tokens=1, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("axis", ["text.width", "vision.width"])
def test_what_cannot_be_rotated_says_so(axis):
    model = random_model(CONFIGS["gemma4-dense"]())
    group = describe(model.config).group(axis)
    with pytest.raises(NotRotatable, match=r"residual stream|constant of the stream"):
        trace(model, group, picture_prompt(model.config))


@pytest.mark.parametrize(
    ("errors", "ok", "draws"),
    [([1e-6], True, 1), ([4e-5, 1e-6], True, 2), ([4e-5, 3e-5, 2e-5], False, 3), ([2e-3], False, 1)],
)
def test_a_doubtful_difference_is_proven_on_another_draw(monkeypatch, errors, ok, draws):
    """One random model may blow rounding up; a difference in every draw, or a large one, is a wrong cut."""
    seen = []

    def prove(model, *_):
        seen.append(float(model.lm_head.weight.detach().sum()))
        return errors[len(seen) - 1]

    monkeypatch.setattr("slimlmm.selfcheck._prove", prove)
    (check,) = self_check(CONFIGS["llava-clip-llama"](), ["text.width"])
    assert (check.ok, check.error) == (ok, errors[draws - 1])
    assert len(set(seen)) == draws, "the same model was drawn again"


def test_a_cut_that_is_off_by_little_is_wrong_in_every_draw(monkeypatch):
    right = surgery._made_up

    def wrong(part, size, keep, rows, tensor):
        last = part.groups[0].slots[0].parameter == "model.language_model.norm.weight"
        return right(part, size, keep, rows, tensor) * (1 + 1e-4 * last)

    monkeypatch.setattr(surgery, "_made_up", wrong)
    (check,) = self_check(CONFIGS["llava-clip-llama"](), ["text.width"])
    assert not check.ok
    assert "differs from the masked one" in check.reason
