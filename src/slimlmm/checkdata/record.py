"""What `check-data` found, as one record; its fields are described, and `kinds` says what each finding means."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from slimlmm.measure import Environment

Severity = Literal["error", "warning", "info"]
Noun = Literal["rows", "pictures", "tasks"]


class Frozen(BaseModel):
    """Part of the record: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(Frozen):
    """One place where a finding was made."""

    split: str = Field(description="train, validation or test; empty where it is about none.")
    file: str = Field(description="File of rows that names it.")
    line: int = Field(description="Line of a .jsonl file, number of the record in any other; 0 where it is about none.")
    id: str = Field(description="Name of the row.")
    note: str = Field(description="What is particular about this one.")


class Finding(Frozen):
    """Everything of one kind that was found."""

    check: str = Field(description="rows, pictures, duplicates, answers or model.")
    kind: str = Field(description="Name of the finding, as in docs/check-data.md.")
    severity: Severity = Field(description="error: do not train; warning: look at it; info: know it.")
    count: int = Field(description="How many of them.")
    of: int = Field(description="How many were looked at.")
    noun: Noun = Field(description="What is counted.")
    said: str = Field(description="What it means and what to do.")
    examples: tuple[Example, ...] = Field(description="The first few.")


class Pictures(Frozen):
    """What the pictures are."""

    count: int = Field(description="Different pictures, by path or embedded bytes.")
    decoded: int = Field(description="Pictures that were decoded whole.")
    bytes: int = Field(description="Bytes of all files.")
    formats: dict[str, int] = Field(description="Pictures per format, of those decoded.")
    modes: dict[str, int] = Field(description="Pictures per colour mode, of those decoded.")
    median_pixels: int = Field(description="Median of width times height, of those decoded; 0 without any.")
    most_pixels: int = Field(description="Largest width times height, of those decoded; 0 without any.")


class Lengths(Frozen):
    """How long answers are."""

    unit: Literal["tokens", "words"] = Field(
        description="tokens of --model, end token included; words without a model."
    )
    p50: float = Field(description="Median.")
    p95: float = Field(description="95th percentile.")
    max: int = Field(description="Longest.")
    limit: int = Field(description="Longer ones are findings.")


class Task(Frozen):
    """Answers of one task in one split."""

    split: str = Field(description="train, validation or test.")
    task: str = Field(description="Kind of question; empty where rows name none.")
    rows: int = Field(description="Rows with an answer.")
    distinct: int = Field(description="Different answers, whitespace normalised.")
    most_frequent: str = Field(description="The answer given most often.")
    share: float = Field(description="Its share of the rows, 0 to 1.")


class Mask(Frozen):
    """What one row is trained on."""

    id: str = Field(description="Name of the row.")
    before: str = Field(description="End of the prompt, decoded.")
    trained: str = Field(description="Tokens that are labels, decoded, end token included.")
    tokens: int = Field(description="How many tokens these are.")
    picture_tokens: int = Field(description="Picture placeholders in the prompt.")


class Model(Frozen):
    """How a model sees the rows."""

    name: str = Field(description="Folder or hub id.")
    fingerprint: str = Field(description="Hash over configuration and weights, by name.")
    context: int | None = Field(description="Positions of its language model; null where its configuration names none.")
    picture_tokens: tuple[int, int] | None = Field(
        description="Least and most placeholders of a picture among rows tried."
    )
    features: int | None = Field(
        description="Tokens that its vision tower gives for the first of them; null if untold."
    )
    masks: tuple[Mask, ...] = Field(description="What a few rows are trained on.")
    self_kl: float | None = Field(
        description="Nats an answer token from the model, asked plainly, to itself through collator and teacher cache; "
        "null where it is no number or could not be run."
    )
    limit: float = Field(description="More than this is misaligned.")
    cross_entropy: float | None = Field(description="Nats an answer token of the given answers.")
    rows: int = Field(description="Rows that were run through the model.")


class CheckData(Frozen):
    """All that was found."""

    source: str = Field(description="DATA as given.")
    splits: dict[str, int] = Field(description="Rows that can be read, by split.")
    errors: int = Field(description="Findings that are errors.")
    warnings: int = Field(description="Findings that are warnings.")
    findings: tuple[Finding, ...] = Field(description="Errors first.")
    pictures: Pictures = Field(description="What the pictures are.")
    lengths: Lengths | None = Field(description="How long answers are; null without any answer.")
    tasks: tuple[Task, ...] = Field(description="Answers by split and task.")
    model: Model | None = Field(description="How the model sees the rows; null without --model.")
    seed: int = Field(description="Seed of the rows that are run through the model.")
    fingerprint: str = Field(description="Hash over all rows and pictures: that of a run that takes all of them.")
    environment: Environment = Field(description="Machine and versions.")
    seconds: float = Field(description="Wall time.")
