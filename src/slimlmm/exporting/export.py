"""`export`: a checkpoint for another runtime or in 8 bits, written only after it was checked against its source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, TorchAoConfig
from transformers.utils import logging

from slimlmm import __version__, checkpoint, data, measure, tables
from slimlmm.checkpoint import MARKER, Loaded
from slimlmm.collate import Prompter
from slimlmm.data import Row
from slimlmm.errors import UserError, nearest
from slimlmm.evaluate import encode
from slimlmm.exporting import checks, graphs, runner
from slimlmm.exporting.folder import digest, whole
from slimlmm.exporting.manifest import Manifest, Shape
from slimlmm.exporting.reading import Reader, pixels_of, same
from slimlmm.exporting.runtimes import RUNTIMES, needed
from slimlmm.measure import Side
from slimlmm.pictures import USUAL, PictureSettings
from slimlmm.progress import Reporter

TORCHAO = "torchao"
TARGETS = (*RUNTIMES, TORCHAO)
#: rows on which the quick reader is compared with the processor
LOOKS = 8
_MODELS: Any = AutoModelForImageTextToText
_LOGGING: Any = logging


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is wanted: `target` in a new folder `out`, at most `max_drop` points worse on `rows` rows of `split`.

    `calls` rows are timed one at a time; `threads` of a CPU work on one operation (default: as torch).
    """

    target: str
    out: Path
    int8: bool = False
    split: str = "test"
    rows: int = 500
    max_drop: float = 0.5
    calls: int = 50
    threads: int | None = None
    seed: int = 0
    allowed: PictureSettings = USUAL


def export(model: str, source: Path, order: Order, tell: Reporter) -> Manifest:
    """Export a folder or hub id, check it on rows of `source`, and put it into `order.out`, whole or not at all.

    Raises:
        UserError: the runtime cannot take the model, is not installed, or the export is worse than allowed.
    """
    if order.target not in TARGETS:
        raise UserError(f"--to {order.target!r} is no runtime. {nearest(order.target, list(TARGETS))}")
    libraries = (TORCHAO,) if order.target == TORCHAO else RUNTIMES[order.target].libraries
    for name in libraries:
        needed(name)
    if order.split not in tables.SPLITS:
        raise UserError(f"--split {order.split!r}: known: {', '.join(tables.SPLITS)}.")
    checkpoint.refuse_foreign(order.out.expanduser().absolute())
    if order.threads:
        torch.set_num_threads(order.threads)
    loaded = checkpoint.load_to_answer(model, device="cpu")  # graphs are traced there
    if order.target != TORCHAO:
        graphs.refuse(loaded.model, model, order.target)
    splits = data.load(source, allowed=order.allowed)
    rows = data.sample(splits.need(order.split, source), order.rows, order.seed)
    write = _torchao if order.target == TORCHAO else _graphs
    with whole(order.out) as folder:
        side, shape = write(loaded, order, rows, folder)
        manifest = _manifest(model, loaded, order, rows, side, shape, folder, libraries, tell)
        manifest.save(folder / MARKER)
    return manifest


def _manifest(
    model: str,
    loaded: Loaded,
    order: Order,
    rows: Sequence[Row],
    side: Side,
    shape: Shape | None,
    folder: Path,
    libraries: Sequence[str],
    tell: Reporter,
) -> Manifest:
    """Check what lies in `folder`, refuse it or say all that is known of it."""
    size = measure.disk_bytes(folder)
    found = checks.check(loaded, side, rows, split=order.split, calls=order.calls, seed=order.seed, tell=tell)
    eight = order.int8 or shape is None
    what = f"{model} in {order.target}{', int8,' if eight else ''}"
    checks.refuse(found, what, max_drop=order.max_drop, exact=not eight)
    return Manifest(
        slimlmm=__version__,
        target=order.target,
        int8=eight,
        how=_how(order, shape),
        model_type=loaded.model.config.model_type,
        source=model,
        source_sha256=digest(loaded.path),
        source_bytes=measure.disk_bytes(loaded.path),
        bytes=size,
        libraries={name: version(name) for name in libraries},
        max_drop=order.max_drop,
        shape=shape,
        check=found,
        threads=torch.get_num_threads(),
        environment=measure.environment(),
    )


def _how(order: Order, shape: Shape | None) -> str:
    if shape is None:
        return "linear layers int8 per channel, the rest as stored; plain from_pretrained, torchao installed"
    return RUNTIMES[order.target].int8 if order.int8 else "all in fp32"


def _graphs(loaded: Loaded, order: Order, rows: Sequence[Row], folder: Path) -> tuple[Side, Shape]:
    """Write the two graphs with processor and generation config; return them as a runner loads them from there."""
    processor = loaded.processor
    first: Any = encode(processor, rows[:1])
    _refuse_inputs(first, order.target)
    count = int((first["input_ids"] == processor.image_token_id).sum())
    pixels, reader = pixels_of(processor), Reader(processor, count)
    if pixels is not None and not _reads_alike(reader, pixels, rows[:LOOKS]):
        pixels = None
    picture = (first if pixels is None else encode(reader, rows[:1]))["pixel_values"]
    runtime = RUNTIMES[order.target]
    with TemporaryDirectory() as scratch:
        (tokens, width), (caches, heads, size) = graphs.write(loaded.model, picture, pixels, Path(scratch))
        for name in ("eyes", "words"):
            runtime.finish(Path(scratch) / f"{name}.onnx", folder, order.int8)
    if tokens != count:
        raise UserError(
            f"a picture becomes {tokens} tokens and its prompt has {count} places for them; exports need one number."
        )
    shape = Shape(
        picture=tuple(picture.shape[1:]),
        reads_bytes=pixels is not None,
        tokens=tokens,
        image_token=processor.image_token_id,
        width=width,
        caches=caches,
        heads=heads,
        head_dim=size,
    )
    checkpoint.copy_processor(loaded.path, folder)
    loaded.model.generation_config.save_pretrained(folder)
    return runner.opened(folder, order.target, shape, threads=order.threads), shape


def _refuse_inputs(inputs: Any, target: str) -> None:
    """Raise a UserError unless a picture is one tensor [1, C, h, w]."""
    more = sorted(set(inputs) - {"input_ids", "attention_mask", "pixel_values"})
    if more or inputs["pixel_values"].dim() != 4 or len(inputs["pixel_values"]) != 1:
        raise UserError(
            f"its processor gives {', '.join(more) or 'several tiles'} beside or for a picture; exports to {target} take "
            f"pictures of one size, as one tensor each. Plain loading takes all: --to torchao."
        )


def _reads_alike(reader: Reader, pixels: graphs.Pixels, rows: Sequence[Row]) -> bool:
    """Return whether the quick reader gives what the processor gives, for these rows together."""
    if reader.tokenizer.pad_token is None:  # then it cannot put several into one batch
        return False
    prompter = Prompter(reader.processor)
    return same(reader, pixels, [prompter.prompt(*row.asked) for row in rows], [row.open() for row in rows])


def _torchao(loaded: Loaded, order: Order, rows: Sequence[Row], folder: Path) -> tuple[Side, None]:
    """Write a checkpoint whose linear layers are int8, safetensors only; return it as plain loading loads it."""
    quantisation: Any = needed("torchao.quantization")
    config: Any = TorchAoConfig(quantisation.Int8WeightOnlyConfig(version=2))
    with _no_bars():
        eight = _MODELS.from_pretrained(
            loaded.path, dtype=loaded.stored, quantization_config=config, local_files_only=True
        )
        eight.save_pretrained(folder)
        checkpoint.copy_processor(loaded.path, folder)
        plain, info = _MODELS.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}
    if wrong or list(folder.glob("*.bin")):
        raise UserError(f"torchao {version(TORCHAO)} wrote a folder that does not load again as it is: {wrong}.")
    return Loaded(model=plain.eval(), processor=loaded.processor, path=folder, stored=loaded.stored), None


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the loader's progress bars."""
    shown = _LOGGING.is_progress_bar_enabled()
    _LOGGING.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _LOGGING.enable_progress_bar()
