"""Settings of one training: how long, how fast, by which losses, taught by whom."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from slimlmm.settings import Settings

LossName = Literal[
    "cross_entropy",
    "pairwise_margin",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "top_k_kl",
    "answer_states",
    "picture_states",
    "block_states",
]
#: losses that compare the student's distribution with the teacher's
DIVERGENCES = frozenset(("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "top_k_kl"))
#: key of a recipe -> the divergence whose further argument it sets, and that argument
SHAPES = {
    "jensen_shannon_beta": ("jensen_shannon", "beta"),
    "skew_kl_alpha": ("skew_kl", "alpha"),
    "top_k": ("top_k_kl", "k"),
}
TeacherName = Literal["first", "previous"]


class Training(Settings):
    """One training: fine-tuning, or recovery by distillation."""

    steps: int = Field(gt=0, description="Number of optimizer steps.")
    pictures_per_step: int = Field(16, gt=0, description="Pictures in one optimizer step, over all micro-batches.")
    questions_per_picture: int = Field(16, gt=0, description="Most questions packed behind one picture.")
    accumulate: int = Field(1, gt=0, description="Micro-batches in one optimizer step.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of the language model and projector.")
    vision_rate: float = Field(
        1.0, ge=0, description="Learning rate of the top vision block, relative to learning_rate."
    )
    layer_decay: float = Field(
        0.9, gt=0, le=1, description="Factor on the learning rate per vision block towards the picture."
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon: matrices of linear maps between hidden states move along the orthogonalised mean of their "
        "gradients, scaled to AdamW's root mean square; embeddings, head, norms, biases and convolutions move by AdamW.",
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of matrices.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in [0, 1) with a rising learning rate.")
    schedule: str = Field(
        "cosine", description="Learning-rate schedule of transformers (cosine, linear, constant_with_warmup ...)."
    )
    clip: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    freeze: tuple[Literal["vision", "text", "projector", "patch_embedding"], ...] = Field(
        ("patch_embedding",), description="Parts without gradient."
    )
    losses: dict[LossName, float] = Field(
        default={"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 0.1},
        min_length=1,
        description="Weight of each loss by name: cross_entropy and pairwise_margin of the labels; forward_kl, reverse_kl, "
        "jensen_shannon, skew_kl and top_k_kl from the teacher's distribution; answer_states (last hidden states at answers) and "
        "picture_states (what enters the language model at pictures), both about 0 to 1 a token. picture_states alone trains "
        "what comes before the language model, which then does not run. block_states: the stream behind every block of both "
        "towers, read linearly where widths differ, 0 to 1 a token in the mean over blocks; the teacher runs at every step, and "
        "nothing of that is cached.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature of the five divergences: logits of student and teacher are divided by it, the loss is "
        "multiplied by its square.",
    )
    jensen_shannon_beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the teacher in the mixture m of jensen_shannon: beta KL(teacher, m) + (1 - beta) KL(student, m).",
    )
    skew_kl_alpha: float = Field(
        0.1, gt=0, lt=1, description="Share of the teacher in the mixture that skew_kl compares the teacher with."
    )
    top_k: int = Field(
        20,
        gt=0,
        description="Likeliest tokens of the teacher that top_k_kl compares one by one; all others count as one.",
    )
    teachers: dict[TeacherName, float] = Field(
        default={"first": 1.0},
        min_length=1,
        description="Weight of each teacher by name: first (the model after the lossless cuts) and previous (the model that the "
        "round began with, nearer to the student in size; in the first round the two are one). A divergence D is the mean "
        "over teachers, sum of w D(teacher, student) / sum of w; states are matched with first, or with previous where first is "
        "left out.",
    )
    own_answers: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pictures of each step, of those that the teacher is asked about, that are learnt from answers "
        "which the student samples itself, with the teacher's distribution at those tokens (on-policy distillation, GKD). "
        "cross_entropy and pairwise_margin do not count there: their labels would be the student's own. The student writes and "
        "the teacher runs at every such step, nothing of it is cached: several times the cost of a step on given answers.",
    )
    own_temperature: float = Field(
        1.0, ge=0, description="Temperature at which the student samples its own answers; 0 for the likeliest tokens."
    )
    validate_every: int | None = Field(
        None,
        gt=0,
        description="Optimizer steps between two looks at the validation rows (cross-entropy of their answers); the weights of "
        "the least one are kept. null: no look, the last weights.",
    )
    stop_after: int = Field(
        4, gt=0, description="Looks in a row without a new best after which a training with `validate_every` stops."
    )
    precision: Literal["auto", "float32"] = Field(
        "auto",
        description="auto multiplies matrices in bfloat16 where the device has units for it (CUDA from Ampere on, CPUs with "
        "AMX or AVX512_BF16); weights and sums stay float32 either way.",
    )
    compile: bool = Field(
        False,
        description="Run vision and text blocks compiled (torch.compile). Compiling takes half a minute or more, so it is for "
        "long trainings; a CPU needs a C++ compiler.",
    )
    log_every: int = Field(20, gt=0, description="Optimizer steps between two log records.")

    @field_validator("losses", "teachers")
    @classmethod
    def _weighed(cls, weights: dict[str, float]) -> dict[str, float]:
        if wrong := [f"{name}: {weight}" for name, weight in weights.items() if not 0 < weight < float("inf")]:
            raise ValueError(f"weights are above 0, not {', '.join(wrong)}; leave out what does not count")
        return weights

    @model_validator(mode="after")
    def _with_effect(self) -> Self:
        """Refuse what would change nothing."""
        if self.compile and "block_states" in self.losses:
            raise ValueError(
                "compile: block_states looks behind every block, so none can be compiled; leave one of them out"
            )
        if DIVERGENCES & set(self.losses):
            return self
        known = ", ".join(sorted(DIVERGENCES))
        if self.own_answers:
            raise ValueError(
                f"own_answers={self.own_answers} needs one of {known} among the losses: nothing else judges them"
            )
        if len(self.teachers) > 1:
            raise ValueError(
                f"teachers: a second one needs one of {known} among the losses; leave out first or previous"
            )
        if "previous" in self.teachers and not {"answer_states", "picture_states", "block_states"} & set(self.losses):
            raise ValueError("teachers: previous has no effect on losses of labels alone; leave it out")
        return self

    def vain(self) -> dict[str, str]:
        """Return what is asked for in vain, and what it would need."""
        needed = {
            "own_temperature": (self.own_answers > 0, "own_answers"),
            "validate_every": (not self.sees_pictures_alone, "a loss that looks at answers"),
            "stop_after": (self.validate_every is not None and not self.sees_pictures_alone, "validate_every"),
            "temperature": (bool(DIVERGENCES & set(self.losses)), "a divergence among the losses"),
        } | {key: (loss in self.losses, f"{loss} among the losses") for key, (loss, _) in SHAPES.items()}
        fields = type(self).model_fields
        return {
            name: what
            for name, (there, what) in needed.items()
            if not there and getattr(self, name) != fields[name].default
        }

    def heard(self) -> Training:
        """Return it without what is asked for in vain."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.vain()})

    @property
    def shapes(self) -> dict[str, dict[str, float]]:
        """What divergences take beside the two distributions, by their names."""
        return {loss: {argument: getattr(self, key)} for key, (loss, argument) in SHAPES.items()}

    @property
    def asks_of_every_picture(self) -> bool:
        """Tell whether a loss asks the teacher about all pictures of a step, those too that are there for their labels alone."""
        return "block_states" in self.losses and bool({"cross_entropy", "pairwise_margin"} & set(self.losses))

    @property
    def sees_pictures_alone(self) -> bool:
        """Tell whether its losses look no further than what enters the language model."""
        return set(self.losses) == {"picture_states"}

    @property
    def still(self) -> frozenset[str]:
        """The parts that do not move: those without gradient, and the language model where no loss looks at it.

        Over several processes it would get gradients of 0, which weight decay takes for a step.
        """
        return frozenset(self.freeze) | ({"text"} if self.sees_pictures_alone else set())
