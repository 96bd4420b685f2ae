"""Evaluation: greedy answers against references, with the errors that belong to them.

An answer is right when it equals the reference after whitespace is normalised (`normalise`); case and
punctuation count. Every mean comes with n and two standard errors: one that takes rows as independent, and
one that takes pictures as independent (several questions share a picture, so the first is too small). Two
models are compared on the same rows: `agreement`, and `paired_bootstrap` over pictures.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from slimlmm.collate import Prompter, padding
from slimlmm.data import Row
from slimlmm.decoding import generation_settings, nothing_else
from slimlmm.errors import UserError
from slimlmm.probes import begun
from slimlmm.resampling import Pictures

#: (rows done, rows in all) -> None
Progress = Callable[[int, int], None]


class Record(BaseModel):
    """Something that is written to results.json: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(Record):
    """Exact match over some rows."""

    n: int = Field(description="Rows answered.")
    correct: int = Field(description="Rows whose answer equals the reference after whitespace is normalised.")
    accuracy: float = Field(description="correct / n, 0 to 1; higher is better.")
    se: float = Field(description="Standard error sqrt(p (1 - p) / n), rows taken as independent.")
    clustered_se: float | None = Field(
        description="Standard error, pictures taken as independent instead of rows; null below two."
    )
    pictures: int = Field(description="Different pictures among the rows.")


class Accuracy(Record):
    """Exact match of one model on one split."""

    overall: Score = Field(description="All rows, each with the same weight.")
    macro: float = Field(
        description="Mean of the tasks' accuracies, each task with the same weight, 0 to 1; that of all rows where none has one."
    )
    tasks: dict[str, Score] = Field(description="Score per task; rows without one are in none.")
    max_new_tokens: int = Field(description="Answers were cut at this many tokens.")


class Interval(Record):
    """An estimate and its interval over pictures: percentile bootstrap, or bounds for few pictures that differ."""

    mean: float = Field(description="The estimate from all rows.")
    low: float | None = Field(description="Lower end of the interval; null below two pictures.")
    high: float | None = Field(description="Upper end of the interval; null below two pictures.")
    level: float = Field(default=0.95, description="Coverage of the interval, 0 to 1.")
    samples: int = Field(default=0, description="Bootstrap samples drawn.")
    seed: int = Field(default=0, description="Seed of the bootstrap.")

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end; from -1 to 1, which rules out nothing, where there is no interval."""
        return (-1.0, 1.0) if self.low is None or self.high is None else (self.low, self.high)

    def points(self, digits: int = 2) -> str:
        """Return it in points: "+0.42 [-0.10, +0.95]"; "+0.42 [-]" where there is no interval."""
        ends = "-" if self.low is None else ", ".join(f"{100 * end:+.{digits}f}" for end in self.ends)
        return f"{100 * self.mean:+.{digits}f} [{ends}]"

    def __neg__(self) -> Interval:
        """Return that of the difference the other way round."""
        low, high = (None if end is None else 0 - end for end in (self.high, self.low))
        return self.model_copy(update={"mean": 0 - self.mean, "low": low, "high": high})


class Prediction(Record):
    """One answered row."""

    id: str = Field(description="Name of the row.")
    task: str = Field(description="Kind of question; empty where the row says none.")
    picture: str = Field(description="Key of the row's picture; rows of one picture share it.")
    question: str = Field(description="Text asked.")
    expected: str = Field(description="Reference answer.")
    answer: str = Field(description="Generated answer.")
    correct: bool = Field(description="Whether the two are equal after whitespace is normalised.")


class Evaluation(Record):
    """Scores of one model on one split, and every prediction in the order of the rows."""

    summary: Accuracy = Field(description="Scores overall and per task.")
    predictions: tuple[Prediction, ...] = Field(description="One per row, in the order of the rows.")
    seconds: float = Field(description="Wall time in seconds.")

    @property
    def accuracy(self) -> float:
        """Share of right answers over all rows."""
        return self.summary.overall.accuracy

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each row was answered right; bool [n]."""
        return np.array([prediction.correct for prediction in self.predictions], dtype=bool)

    @property
    def clusters(self) -> list[str]:
        """Picture key of each row; n strings."""
        return [prediction.picture for prediction in self.predictions]

    @property
    def answers(self) -> list[str]:
        """Generated answer of each row; n strings."""
        return [prediction.answer for prediction in self.predictions]

    def only(self, task: str) -> Evaluation:
        """Return the evaluation of one task's rows."""
        predictions = tuple(prediction for prediction in self.predictions if prediction.task == task)
        return Evaluation(
            summary=_summary(predictions, self.summary.max_new_tokens),
            predictions=predictions,
            seconds=self.seconds,
        )


def normalise(text: str) -> str:
    """Return the text in NFC, stripped, with each run of whitespace made one space; nothing else is forgiven.

    Composed and decomposed letters are the same text, and many tokenizers write one form only.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def encode(processor: Any, rows: Sequence[Row], pictures: Sequence[Image.Image] | None = None) -> Any:
    """Return the model's inputs for one batch of questions, padded on the left; tensors on the CPU."""
    opened = [row.open() for row in rows] if pictures is None else pictures
    images = [[picture] for picture in opened]
    prompter = Prompter(processor)
    return encode_texts(processor, [prompter.prompt(*row.asked) for row in rows], images)


def encode_texts(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None) -> Any:
    """Return the model's inputs for prompts with the pictures of each, None for none; padded on the left, on the CPU."""
    with padding(processor.tokenizer, "left"):
        return processor(text=texts, images=images, padding=True, return_tensors="pt", **begun(processor, texts[0]))


def answer(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    pictures: Sequence[Image.Image] | None = None,
) -> list[str]:
    """Answer one batch greedily, from picture files to texts; opens the pictures unless they are given.

    A row's answer ends at the end token or after `max_new_tokens`. The model must be in evaluation mode.
    """
    tokens_BT = generated(model, processor, rows, generation_settings(model, processor, max_new_tokens), pictures)
    texts: list[str] = processor.tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
    return texts


@torch.inference_mode()
def generated(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    pictures: Sequence[Image.Image] | None = None,
) -> Tensor:
    """Return the tokens [B, T] that the model writes after each prompt, padded behind the end token."""
    batch = encode(processor, rows, pictures).to(model.device, dtype=model.dtype)
    with nothing_else(model):
        tokens_BT: Tensor = model.generate(**batch, **settings)
    asked = batch["input_ids"]
    length = asked.shape[1]
    if tokens_BT.shape[1] >= length and torch.equal(tokens_BT[:, :length], asked):
        tokens_BT = tokens_BT[:, length:]
    return tokens_BT


def answer_limit(processor: Any, rows: Sequence[Row]) -> int:
    """Return how many tokens an answer may have: the longest reference and 4 more.

    Exact match loses nothing by it: a longer answer is wrong wherever it is cut (the 4 allow for the end
    token and for another segmentation of the same text).
    """
    texts = sorted({row.answer for row in rows})
    lengths = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return max(len(ids) for ids in lengths) + 4


def evaluate(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every row greedily and compare with the references.

    Questions about one picture go into the same batch and the vision tower sees the picture once
    (`one_look`); the result does not depend on it, nor on the batch size. `max_new_tokens` defaults to
    `answer_limit`. The model's mode is restored.
    """
    if not rows:
        raise UserError("nothing to evaluate: the split is empty.")
    limit = max_new_tokens or answer_limit(processor, rows)
    keys = [row.picture_key() for row in rows]
    rank = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    order = sorted(range(len(rows)), key=lambda i: (rank[keys[i]], i))
    answers = [""] * len(rows)
    start = time.perf_counter()
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            opened = {keys[i]: rows[i] for i in part}
            pictures = {key: row.open() for key, row in opened.items()}
            with one_look(model, [keys[i] for i in part]):
                texts = answer(model, processor, [rows[i] for i in part], limit, [pictures[keys[i]] for i in part])
            for i, text in zip(part, texts, strict=True):
                answers[i] = text
            if progress is not None:
                progress(first + len(part), len(rows))
    return grade(rows, answers, keys, max_new_tokens=limit, seconds=time.perf_counter() - start)


def grade(
    rows: Sequence[Row],
    answers: Sequence[str],
    keys: Sequence[str],
    *,
    max_new_tokens: int,
    seconds: float = 0.0,
) -> Evaluation:
    """Compare answers with references; `keys` name each row's picture."""
    predictions = tuple(
        Prediction(
            id=str(row.id),
            task=row.task,
            picture=key,
            question=row.question,
            expected=row.answer,
            answer=normalise(text),
            correct=normalise(text) == normalise(row.answer),
        )
        for row, text, key in zip(rows, answers, keys, strict=True)
    )
    return Evaluation(summary=_summary(predictions, max_new_tokens), predictions=predictions, seconds=seconds)


def score(correct: ArrayLike, clusters: Sequence[str]) -> Score:
    """Return the share of right answers with both standard errors.

    With p the mean over n rows x_i in G pictures: se = sqrt(p (1 - p) / n); clustered_se = sqrt(G / (G - 1) *
    sum_g (sum_{i in g} (x_i - p))^2) / n (sandwich estimator of a mean, CR1; Cameron and Miller 2015, "A
    Practitioner's Guide to Cluster-Robust Inference", section II). `correct` [n], `clusters` n keys.
    """
    right = np.asarray(correct, dtype=float)
    n, p = len(right), float(right.mean())
    sums, _ = _per_cluster(right - p, clusters)
    count = len(sums)
    clustered = float(np.sqrt(count / (count - 1) * (sums**2).sum()) / n) if count > 1 else None
    return Score(
        n=n,
        correct=int(right.sum()),
        accuracy=p,
        se=float(np.sqrt(p * (1 - p) / n)),
        clustered_se=clustered,
        pictures=count,
    )


def agreement(a: Evaluation, b: Evaluation) -> float:
    """Return the share of rows that both models answered alike, right or wrong; 0 to 1."""
    _same_rows(a, b)
    return float(np.mean([x == y for x, y in zip(a.answers, b.answers, strict=True)]))


def drop(a: Evaluation, b: Evaluation, *, samples: int = 10_000, seed: int = 0) -> Interval:
    """Return accuracy of `a` minus that of `b` on the same rows, with its interval (`paired_bootstrap`)."""
    _same_rows(a, b)
    return paired_bootstrap(a.correct, b.correct, a.clusters, samples=samples, seed=seed)


def paired_bootstrap(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    clusters: Sequence[str],
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return mean(correct_a) - mean(correct_b) over the same rows, with an interval over pictures.

    Pictures, not rows, are drawn with replacement: a sample of G pictures has the mean sum_g d_g / sum_g n_g,
    d_g the sum of a - b over the rows of picture g, n_g its rows. Positive: a is better. `correct_a`,
    `correct_b` [n] of 0/1, `clusters` n keys. Units: shares, 0 to 1. Source: Efron and Tibshirani 1993,
    chapter 13 (percentile interval); cluster resampling as in Davison and Hinkley 1997, section 3.8. Where few
    pictures differ, bounds for few take its place; one picture has no interval (`Pictures.interval`).
    """
    return paired_test(correct_a, correct_b, clusters, samples=samples, seed=seed, level=level)[0]


def paired_test(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    clusters: Sequence[str],
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Interval, float | None]:
    """Return the interval of `paired_bootstrap` and the two-sided p-value of "no difference" (`Pictures.p_value`)."""
    difference = np.asarray(correct_a, dtype=float) - np.asarray(correct_b, dtype=float)
    if len(difference) == 0 or len(difference) != len(clusters):
        raise ValueError(f"need one cluster per row, got {len(difference)} rows and {len(clusters)} clusters")
    sums, sizes = _per_cluster(difference, clusters)
    pictures = Pictures(sums, sizes, samples, seed)
    low, high = pictures.interval(level) or (None, None)
    found = Interval(mean=float(difference.mean()), low=low, high=high, level=level, samples=samples, seed=seed)
    return found, pictures.p_value()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode, and back into the mode it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


#: towers that give all pictures of a batch in one sequence, as was seen
_IN_ONE: WeakSet[Any] = WeakSet()


@contextmanager
def one_look(model: Any, keys: Sequence[str]) -> Iterator[None]:
    """Let the vision tower compute each distinct picture of a batch once; `keys` [B] name the rows' pictures.

    Works where all tensors that the tower gets and gives have B as their first dimension (one picture a row): it
    runs on the U distinct rows (on one twice, to see whether two come out) and its outputs [U, ...] are copied
    back to [B, ...]. Elsewhere (towers that take or give the patches of all pictures as one sequence) it changes
    nothing.
    """
    tower = model.get_encoder(modality="image")
    distinct = {key: position for position, key in reversed(list(enumerate(keys)))}
    taken = sorted(distinct.values())
    back = [taken.index(distinct[key]) for key in keys]
    if tower is model or len(taken) == len(keys):
        yield
        return
    plain, few = tower.forward, taken * 2 if len(taken) == 1 else taken

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tower in _IN_ONE or any(tensor.dim() == 0 or len(tensor) != len(keys) for tensor in tensors):
            return plain(*args, **kwargs)
        few_args, few_kwargs = tree_map_only(Tensor, lambda tensor: tensor[few], (args, kwargs))
        found = plain(*few_args, **few_kwargs)
        given = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if any(tensor.dim() == 0 or len(tensor) != len(few) for tensor in given):
            _IN_ONE.add(tower)
            return plain(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor[back], found)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def _summary(predictions: Sequence[Prediction], max_new_tokens: int) -> Accuracy:
    """Score predictions overall and per task."""

    def scored(part: Sequence[Prediction]) -> Score:
        return score([one.correct for one in part], [one.picture for one in part])

    names = sorted({one.task for one in predictions} - {""})
    tasks = {name: scored([one for one in predictions if one.task == name]) for name in names}
    overall = scored(predictions)
    macro = float(np.mean([task.accuracy for task in tasks.values()])) if tasks else overall.accuracy
    return Accuracy(overall=overall, macro=macro, tasks=tasks, max_new_tokens=max_new_tokens)


def _per_cluster(values: NDArray[Any], clusters: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the sum of the values and the number of rows in each cluster; [n], n keys -> [G], [G]."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=values, minlength=len(names))
    return sums, np.bincount(index, minlength=len(names))


def _same_rows(a: Evaluation, b: Evaluation) -> None:
    """Refuse to compare evaluations of different rows."""
    if [p.id for p in a.predictions] != [p.id for p in b.predictions]:
        raise UserError(f"the two evaluations are of different rows ({len(a.predictions)} and {len(b.predictions)}).")
