import pytest
import torch
import transformers as tf

from slimlmm import distill, spans
from slimlmm.anatomy import describe
from slimlmm.collate import Collator
from slimlmm.data import by_picture
from slimlmm.distill import train
from slimlmm.errors import UserError
from slimlmm.forward import answer_logits, first_text_block, states_into, states_until
from slimlmm.losses import DIVERGENCES, LOSSES, MATCHES, NEEDS_TEACHER
from slimlmm.teacher import TeacherCache
from slimlmm.trainings import Training
from tiny import tiny
from zoo.others import fast_vlm

NAME = "llava-dinov2-llama"


def settings(**changes):
    return Training(**({"steps": 4, "pictures_per_step": 4, "log_every": 1} | changes))


@pytest.fixture(scope="module")
def itself(tmp_path_factory, rows):
    """A teacher's cache, shared by what only reads it, and its processor."""
    model, processor = tiny(NAME)
    return TeacherCache(model, Collator(processor, packed=True), tmp_path_factory.mktemp("cache")), processor


def student_of(cache, noise=0.0):
    """A copy of the teacher, its matrices disturbed by `noise` of their size."""
    student, _ = tiny(NAME)
    student.load_state_dict(cache.model.state_dict())
    torch.manual_seed(1)
    for parameter in student.parameters():
        if noise and parameter.ndim > 1:
            parameter.data.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    return student


def test_distilling_a_model_from_itself_starts_at_zero_of_all_divergences(tmp_path, rows, itself):
    cache, processor = itself
    every = settings(steps=1, losses=dict.fromkeys(DIVERGENCES, 1.0), temperature=2.0)
    result = train(student_of(cache), processor, rows.train, every, tmp_path, teacher=cache)
    assert result.first_loss == pytest.approx(0, abs=2e-4)
    assert {f"loss/{name}" for name in DIVERGENCES} < result.history[0].keys()


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "picture_states"])  # that one is pulled below
def test_training_on_one_loss_alone_lowers_it(tmp_path, rows, itself, loss):
    cache, processor = itself
    alone = settings(steps=16, learning_rate=3e-3, losses={loss: 1.0}, temperature=1.5)
    result = train(student_of(cache, 1.0), processor, rows.train, alone, tmp_path, teacher=cache)
    assert 0 < result.last_loss < 0.95 * result.first_loss
    assert result.flops > 0


def test_a_hot_training_sees_one_quadratic_in_every_divergence(tmp_path, rows, itself):
    """For close distributions KL is four times the Jensen-Shannon divergence; heat brings them close."""
    cache, processor = itself
    ratios = []
    for temperature in (1.0, 30.0):
        losses = settings(steps=1, losses={"forward_kl": 1.0, "jensen_shannon": 1.0}, temperature=temperature)
        result = train(student_of(cache, 1.0), processor, rows.train, losses, tmp_path, teacher=cache)
        ratios.append(result.history[0]["loss/forward_kl"] / result.history[0]["loss/jensen_shannon"])
    assert ratios[0] > 4.2
    assert ratios[1] == pytest.approx(4, rel=0.02)


def test_a_training_hears_the_shapes_of_its_divergences(tmp_path, rows, itself):
    cache, processor = itself
    first = []
    for k in (1, 4, 100_000):
        losses = settings(steps=1, losses={"top_k_kl": 1.0, "forward_kl": 1.0}, top_k=k)
        first.append(train(student_of(cache, 1.0), processor, rows.train, losses, tmp_path, teacher=cache).history[0])
    one, four, every = (record["loss/top_k_kl"] for record in first)
    assert 0 < one < four < every == pytest.approx(first[2]["loss/forward_kl"])


@pytest.mark.parametrize("losses", [["answer_states"], ["answer_states", "picture_states", "cross_entropy"]])
def test_states_of_a_model_match_its_own(tmp_path, rows, itself, losses):
    cache, processor = itself
    result = train(
        student_of(cache),
        processor,
        rows.train,
        settings(steps=1, losses=dict.fromkeys(losses, 1.0)),
        tmp_path,
        teacher=cache,
    )
    for name in MATCHES.keys() & losses:
        assert result.history[0][f"loss/{name}"] < 0.02, name  # the ridge of the readout alone


def test_picture_states_of_a_model_match_its_own_and_pull_another_tower_towards_them(tmp_path, rows):
    model, processor = tiny(NAME)
    cache = TeacherCache(model, Collator(processor, packed=True), tmp_path / "cache")
    losses = {"picture_states": 1.0}
    student, _ = tiny(NAME)
    student.load_state_dict(model.state_dict())
    result = train(student, processor, rows.train, settings(losses=losses), tmp_path, teacher=cache)
    assert result.history[0]["loss/picture_states"] < 0.02  # the ridge of the readout alone
    torch.manual_seed(1)
    for parameter in student.model.vision_tower.parameters():
        parameter.data.add_(2 * parameter.std(correction=0) * torch.randn_like(parameter))
    steps = settings(steps=30, learning_rate=1e-3, losses=losses)
    history = train(student, processor, rows.train, steps, tmp_path, teacher=cache).history
    assert history[-1]["loss/picture_states"] < 0.8 * history[0]["loss/picture_states"]


def test_only_picture_states_stops_at_the_language_model_with_the_same_loss_and_gradient(rows):
    model, processor = tiny(NAME)
    batch = Collator(processor, packed=True)(by_picture(rows.train[:20], 16))
    block = first_text_block(model, describe(model.config))
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append(1))
    with states_into(block, batch["picture_tokens"]) as seen:
        answer_logits(model, batch)
    assert len(ran) == 1
    stopped = states_until(model, block, batch)
    assert len(ran) == 1
    assert torch.equal(stopped, seen[0])
    gradients = [
        torch.autograd.grad(states.square().sum(), model.model.multi_modal_projector.linear_1.weight)[0]
        for states in (seen[0], stopped)
    ]
    assert torch.equal(*gradients)
    answer_logits(model, batch)  # nothing is left behind on the block
    assert len(ran) == 2


@pytest.mark.parametrize("losses", [["picture_states"], ["answer_states", "picture_states"]])
def test_readouts_alone_stay_at_their_optimum(tmp_path, rows, itself, losses):
    """Gradients of the readouts, which the Trainer does not own, must not pile up from step to step."""
    cache, processor = itself
    student = student_of(cache)
    for parameter in student.model.vision_tower.parameters():
        parameter.data.add_(parameter.std(correction=0) * torch.randn_like(parameter))
    frozen = settings(
        steps=40,
        log_every=10,
        learning_rate=3e-3,
        schedule="constant_with_warmup",
        losses=dict.fromkeys(losses, 1.0),
        freeze=("vision", "text", "projector"),
    )
    history = train(student, processor, rows.train, frozen, tmp_path, teacher=cache).history
    assert history[-1]["loss"] < 1.1 * history[0]["loss"]


def test_fine_tuning_lowers_the_loss_and_is_the_same_bytes_for_the_same_seed(tmp_path, rows):
    weights = []
    for _ in range(2):
        model, processor = tiny(NAME)
        result = train(
            model,
            processor,
            rows.train,
            settings(steps=12, learning_rate=3e-3, losses={"cross_entropy": 1.0}),
            tmp_path,
            seed=3,
        )
        weights.append(model.state_dict())
    assert result.last_loss < result.first_loss - 0.3
    assert result.row_visits == 12 * 40
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_micro_batches_give_the_step_of_one_large_batch(tmp_path, rows):
    states = []
    step = {
        "steps": 1,
        "warmup": 0.0,
        "losses": {"cross_entropy": 1.0},
        "schedule": "constant",
        "precision": "float32",
    }
    for accumulate in (1, 4):
        model, processor = tiny(NAME)
        train(
            model,
            processor,
            rows.train,
            settings(**step, accumulate=accumulate),
            tmp_path,
        )
        states.append(model.state_dict())
    assert all(torch.allclose(states[0][name], states[1][name], atol=2e-5) for name in states[0])


def test_frozen_parts_do_not_move_and_stay_trainable_afterwards(tmp_path, rows):
    model, processor = tiny(NAME)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, processor, rows.train, settings(freeze=("vision",), losses={"cross_entropy": 1.0}), tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_patch_embedding_is_frozen_by_default(tmp_path, rows):
    model, processor = tiny(NAME)
    name = next(name for name, value in model.state_dict().items() if value.ndim == 4)
    before = model.state_dict()[name].clone()
    train(model, processor, rows.train, settings(losses={"cross_entropy": 1.0}), tmp_path)
    assert torch.equal(model.state_dict()[name], before)


def test_losses_that_need_a_teacher_are_refused_by_name_without_one(tmp_path, rows):
    model, processor = tiny(NAME)
    with pytest.raises(UserError, match="forward_kl needs a teacher"):
        train(model, processor, rows.train, settings(), tmp_path)
    every = settings(losses=dict.fromkeys(LOSSES, 1.0))
    with pytest.raises(UserError) as refusal:
        train(model, processor, rows.train, every, tmp_path)
    assert all(name in str(refusal.value).partition(" needs ")[0] for name in NEEDS_TEACHER)


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, rows):
    model, processor = tiny(NAME)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the loss became nan"):
        train(model, processor, rows.train, settings(losses={"cross_entropy": 1.0}), tmp_path)


@pytest.mark.parametrize(
    "losses",
    [
        ["answer_states"],
        ["picture_states"],
        ["picture_states", "answer_states", "forward_kl"],
        ["block_states"],
        ["block_states", "forward_kl"],
    ],
)
@pytest.mark.parametrize("some", [False, True])
def test_the_states_of_a_step_weigh_the_same_in_however_many_batches(tmp_path, rows, losses, some):
    """Pictures differ in their number of questions, and the teacher may be asked about some alone."""
    groups = by_picture(rows.train, 16)[:4]
    uneven = [row for at, group in enumerate(groups) for row in group[: 2 * at + 1]]
    taught = frozenset(group[0].picture_key() for group in groups[:3]) if some else None
    found = []
    for accumulate in (1, 2, 4):
        model, processor = tiny(NAME, 3)
        cache = TeacherCache(tiny(NAME)[0], Collator(processor, packed=True), tmp_path / "cache")
        more = {"losses": dict.fromkeys(losses, 1.0), "warmup": 0.0, "clip": 1e9, "precision": "float32"}
        asked = settings(steps=1, pictures_per_step=4, accumulate=accumulate, **more)
        result = train(model, processor, uneven, asked, tmp_path, teacher=cache, taught=taught)
        found.append((result.history[0]["loss"], result.history[0]["grad_norm"]))
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3)
        assert norm == pytest.approx(found[0][1], rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_step_moves_weights_where_there_is_no_warmup(tmp_path, rows, steps):
    model, processor = tiny(NAME)
    before = model.get_output_embeddings().weight.clone()
    asked = settings(steps=steps, log_every=1, warmup=0.0, learning_rate=1e-2, losses={"cross_entropy": 1.0})
    rates = [one["learning_rate"] for one in train(model, processor, rows.train, asked, tmp_path).history]
    assert len(rates) == steps
    assert not torch.equal(model.get_output_embeddings().weight, before)
    assert spans.schedule(torch.optim.SGD(model.parameters(), lr=1.0), asked, 0).get_last_lr() == [1.0]


def test_floating_point_operations_are_those_of_the_gradients_that_are_made(tmp_path, rows):
    flops = []
    for frozen in ((), ("text",)):
        model, processor = tiny(NAME)
        asked = settings(steps=1, freeze=frozen, losses={"cross_entropy": 1.0})
        flops.append(train(model, processor, rows.train[:40], asked, tmp_path).flops)
    assert flops[0] > 1.05 * flops[1]


def test_what_leaves_nothing_to_train_is_refused(tmp_path, rows):
    model, processor = tiny(NAME)
    asked = settings(freeze=("vision", "text", "projector"), losses={"cross_entropy": 1.0})
    with pytest.raises(UserError, match=r"train.freeze: vision, text, projector leaves nothing to train"):
        train(model, processor, rows.train, asked, tmp_path)


def test_one_process_trains_on_one_gpu_of_several(tmp_path, monkeypatch):
    class Several:
        """What the Trainer's arguments are where CUDA shows three GPUs."""

        device, n_gpu, _n_gpu = torch.device("cuda:0"), 3, 3

    monkeypatch.setattr(distill, "TrainingArguments", lambda **_: Several())
    assert distill._arguments(settings(), tmp_path, 0, torch.device("cpu"), None)._n_gpu == 1


def test_rates_are_told_as_the_recipe_gives_them(tmp_path, rows):
    model, processor = tiny(NAME)
    asked = settings(
        steps=2, log_every=1, schedule="constant", learning_rate=1e-3, vision_rate=0.1, losses={"cross_entropy": 1.0}
    )
    found = train(model, processor, rows.train, asked, tmp_path).history
    assert [one["learning_rate"] for one in found] == pytest.approx([1e-3, 1e-3])


def test_a_q_former_learns_from_itself_at_zero(tmp_path, rows):
    student, processor = tiny("blip2-opt")
    for part in student.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # the Q-Former's drop a tenth
        elif isinstance(vars(part).get("dropout"), float):
            part.dropout = 0.0  # OPT's too
    cache = TeacherCache(tiny("blip2-opt")[0], Collator(processor, packed=False), tmp_path)
    asked = settings(steps=2, learning_rate=1e-9, losses={"forward_kl": 1.0, "picture_states": 1.0})
    found = train(student, processor, rows.train[:40], asked, tmp_path, teacher=cache).history[0]
    assert found["loss/forward_kl"] == pytest.approx(0, abs=1e-4)
    assert found["loss/picture_states"] < 0.05


def with_batch_norms():
    """FastVLM with a tower that normalises over batches, as its real one does, and a processor of four tokens a picture."""
    config, (_, processor) = fast_vlm(), tiny("llava-siglip-qwen2")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    config.vision_config = tf.ResNetConfig(**sizes, layer_type="basic", hidden_size=32)
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_id = processor.image_token_id
    processor.patch_size, processor.image_processor.size = 32, {"height": 64, "width": 64}
    processor.image_processor.crop_size = processor.image_processor.size
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(config)
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value += torch.rand_like(value)
    return model.eval(), processor


@pytest.mark.parametrize("freeze", [(), ("vision",)])
def test_norms_over_batches_keep_the_statistics_that_the_model_answers_with(tmp_path, rows, freeze):
    (student, processor), (teacher, _) = with_batch_norms(), with_batch_norms()
    cache = TeacherCache(teacher, Collator(processor, packed=False), tmp_path / "cache")
    asked = settings(steps=2, learning_rate=1e-9, losses={"forward_kl": 1.0}, freeze=freeze)
    found = train(student, processor, rows.train[:40], asked, tmp_path, teacher=cache)
    assert found.first_loss == pytest.approx(0, abs=1e-4)  # the teacher that was asked was in eval mode
    before = dict(teacher.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in student.named_buffers())
