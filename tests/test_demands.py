"""What a training asks for in vain is refused before it runs, each by its key; what it can have is not."""

from types import SimpleNamespace

import pytest

from slimlmm import demands
from slimlmm.errors import UserError
from slimlmm.losses import NEEDS_TEACHER
from slimlmm.saving import Saving
from slimlmm.trainings import Training

LABELS = {"cross_entropy": 1.0}
KL = {"forward_kl": 1.0}
THERE = object()  # a teacher's cache, of which only the presence counts


def checked(rows=("row",), teacher=None, previous=None, validation=(), saving=None, **keys):
    settings = Training(**({"steps": 4, "losses": LABELS} | keys))
    demands.check(settings, rows, teacher, previous, validation, saving)


def test_what_is_there_is_not_refused(monkeypatch):
    for schedule in ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"):
        checked(schedule=schedule)
    checked(teacher=THERE, losses=KL, own_answers=0.5)
    checked(teacher=THERE, previous=THERE, losses=KL, teachers={"first": 1.0, "previous": 1.0})
    checked(validation=("row",), validate_every=2)
    checked(saving=Saving(1.0, "it", print), pictures_per_step=6, accumulate=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    checked(pictures_per_step=6, accumulate=3)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"rows": ()}, "no rows to train on"),
        ({"schedule": "reduce_lr_on_plateau"}, r"train.schedule='reduce_lr_on_plateau' is unknown or needs more"),
        ({"schedule": "cosine_with_min_lr"}, r"train.schedule='cosine_with_min_lr' is unknown or needs more"),
        ({"schedule": "warmup_stable_decay"}, "is unknown or needs more"),
        ({"schedule": "cosin"}, "is unknown or needs more"),
        ({"losses": KL, "own_answers": 0.5}, r"train.own_answers=0.5 needs a teacher"),
        ({"losses": KL, "teachers": {"previous": 1.0}, "teacher": THERE}, r"train.teachers: previous .*none here"),
        ({"losses": KL, "teachers": {"previous": 1.0}, "previous": THERE}, r"train.teachers: previous .*none here"),
        ({"validate_every": 2}, "train.validate_every needs validation rows"),
        (
            {"validate_every": 2, "validation": ("row",), "losses": {"picture_states": 1.0}, "teacher": THERE},
            "train.validate_every looks at answers",
        ),
        ({"pictures_per_step": 7, "accumulate": 2}, r"pictures_per_step=7 must be a multiple of train.accumulate=2\.$"),
        *(({"losses": {name: 1.0}}, f"train.losses: {name} needs a teacher") for name in sorted(NEEDS_TEACHER)),
    ],
)
def test_what_is_lacking_is_named(asked, told):
    with pytest.raises(UserError, match=told):
        checked(**asked)


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_what_needs_whole_weights_is_refused_by_name_where_they_are_shared_out(kind):
    trainer = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | {kind: True})
    whole = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False)
    for asked, told in (
        (Training(steps=1, losses=KL, own_answers=0.5), r"^train.own_answers: .*weights whole in every process"),
        (Training(steps=1, optimizer="muon"), r"^train.optimizer: muon .*weights whole in every process"),
    ):
        with pytest.raises(UserError, match=told):
            demands.refuse_shards(trainer, asked)
        demands.refuse_shards(whole, asked)
    demands.refuse_shards(trainer, Training(steps=1))
