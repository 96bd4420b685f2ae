"""What is known of an export, ``slimlmm.json`` in its folder: where it came from, how it was made, what was checked."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from slimlmm.evaluate import Accuracy, Interval, Record
from slimlmm.measure import Comparison, Environment
from slimlmm.results import File

Target = Literal["onnx", "openvino", "torchao"]


class Shape(Record):
    """What the runner of two graphs must know."""

    picture: tuple[int, ...] = Field(description="Shape of one picture as the eyes take it: channels, height, width.")
    reads_bytes: bool = Field(
        description="Whether the eyes take bytes and normalise them, or what the processor gives."
    )
    tokens: int = Field(description="Tokens of a picture.")
    image_token: int = Field(description="Token id of a placeholder.")
    width: int = Field(description="Hidden size of the language model.")
    caches: int = Field(description="Tensors of keys and values, two a layer.")
    heads: int = Field(description="Key/value heads.")
    head_dim: int = Field(description="Dimensions of a head.")


class Check(Record):
    """An export against its source, on the same rows."""

    n: int = Field(description="Rows answered by both.")
    split: str = Field(description="Split that they are of.")
    fingerprint: str = Field(description="Hash over these rows and their pictures.")
    seed: int = Field(0, description="Seed that they were drawn by.")
    source: Accuracy = Field(description="Exact match of the source, in fp32.")
    export: Accuracy = Field(description="Exact match of the export.")
    drop: Interval = Field(
        description="Accuracy of the source minus that of the export, paired bootstrap over pictures."
    )
    agreement: float = Field(description="Share of rows that both answered alike, 0 to 1.")
    logits_max: float = Field(description="Largest absolute difference among the logits of all first answer tokens.")
    logits_scale: float = Field(description="Largest absolute logit of the source among them.")
    latency: Comparison = Field(
        description="Picture file to answer text, batch 1, in turns: first source, then export."
    )


class Manifest(File):
    """An export."""

    WHAT: ClassVar[str] = "manifest of an export"

    slimlmm: str = Field(description="Version that wrote it.")
    target: Target = Field(description="What runs it.")
    int8: bool = Field(description="Whether weights are in 8 bits.")
    how: str = Field(description="Number formats, in words.")
    model_type: str = Field(description="Model type of the source.")
    source: str = Field(description="Folder or id of the source, as given.")
    source_sha256: str = Field(description="Hash over the source's configuration and weights, file by file.")
    source_bytes: int = Field(description="Bytes of the source's folder.")
    bytes: int = Field(description="Bytes of the export's own files, this one not counted.")
    libraries: dict[str, str] = Field(
        description="Versions of what wrote and runs it, torch and transformers in environment."
    )
    max_drop: float = Field(description="Points of accuracy that it was allowed to lose.")
    shape: Shape | None = Field(None, description="What the runner needs; null for plain loading.")
    check: Check = Field(description="The export against its source.")
    threads: int = Field(description="CPU threads of one operation, for both.")
    environment: Environment = Field(description="Machine and versions.")
