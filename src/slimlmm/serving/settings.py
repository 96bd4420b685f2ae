"""What `slimlmm serve` serves, as validated settings: a YAML file, an option over it where one was given."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, TypeAdapter, field_validator, model_validator

from slimlmm.errors import UserError
from slimlmm.files import is_file
from slimlmm.serving.canary import CanarySettings
from slimlmm.serving.limits import Limits
from slimlmm.serving.metering import Metering
from slimlmm.serving.shadow import Shadowing
from slimlmm.settings import Settings, fields, read_yaml, valid


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds graphs of `slimlmm export` rather than a checkpoint."""
    return any(is_file(folder / f"words.{kind}") for kind in ("onnx", "xml"))


def _source(told: Any) -> Any:
    """Take a text for a URL where it looks like one, else for a folder."""
    if isinstance(told, str):
        return {"urls": [told]} if told.startswith(("http://", "https://")) else {"folder": told}
    return told


class Source(Settings):
    """A model: a folder, which an embedded engine serves, or servers that have it already."""

    folder: str | None = Field(None, description="Folder of a checkpoint or export, put behind the embedded engine.")
    urls: tuple[str, ...] = Field((), description="OpenAI-compatible servers of one model; several are replicas.")
    model: str | None = Field(None, description="Name of the model on those servers; default: as the user asks.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, told: Any) -> Any:
        return _source(told)

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"{', '.join(map(repr, wrong))}: no http:// or https:// address")
        return urls

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.folder is None) == (not self.urls):
            raise ValueError("give either folder or urls")
        held = None if self.folder is None else Path(self.folder)
        if held is not None and not (is_export(held) or is_file(held / "config.json")):
            raise ValueError(f"{self.folder}: has no config.json; give the folder of a model, or engines that serve it")
        return self

    @property
    def label(self) -> str:
        """What records call the model."""
        return self.folder or self.model or ", ".join(self.urls)


class Batching(Settings):
    """How embedded engines answer."""

    size: int = Field(16, ge=1, le=1024, description="Requests that are answered together.")
    wait_ms: float = Field(2.0, ge=0, le=1000, description="Milliseconds that they wait for a batch to fill.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: as torch decides.")


class Storing(Settings):
    """Where answers, pairs and decisions are recorded."""

    where: str = Field("slimlmm-serve.sqlite", description="A file (SQLite), or a URL such as postgresql+psycopg://...")
    retention_days: float | None = Field(90.0, gt=0, description="Days that records are kept; null: for ever.")


class Serving(Settings):
    """One gateway."""

    student: Source = Field(description="The model before users.")
    name: str | None = Field(None, description="Its name for users; default: the folder's, or that on the servers.")
    teacher: Source | None = Field(None, description="The model that it is compared with and that helps it out.")
    shadow: Shadowing | None = Field(None, description="Compare a share of answers with the teacher's.")
    escalate: Path | None = Field(None, description="File of slimlmm calibrate: unsure answers are the teacher's.")
    candidate: Source | None = Field(None, description="Another student, which gets the canary's weight.")
    canary: CanarySettings = Field(CanarySettings(), description="The candidate's weight, and what takes it back.")
    store: Storing | None = Field(
        None, description="The store; shadow, escalation, a candidate and energy have one anyway."
    )
    energy: Metering | None = Field(None, description="Record what the machine's energy counter says.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    limits: Limits = Field(Limits(), description="What is let in.")
    batching: Batching = Field(Batching(), description="How embedded engines answer.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Refuse what needs a teacher without one."""
        if self.teacher is None and (missing := [name for name in ("shadow", "escalate") if getattr(self, name)]):
            raise ValueError(f"{' and '.join(missing)}: need a teacher")
        if self.teacher is not None and self.shadow is None and self.escalate is None:
            raise ValueError("teacher: nothing asks it; give shadow, escalate or both")
        return self

    @property
    def stored(self) -> Storing | None:
        """The store that is named, or the usual one where something needs one."""
        return self.store or (Storing() if self.teacher or self.candidate or self.energy else None)

    @property
    def shown(self) -> str:
        """The student's name for users."""
        return self.name or (Path(self.student.folder).name if self.student.folder else self.student.model or "student")


#: settings by the key that holds them
PLACES: Mapping[str, type[Settings]] = {
    "student": Source,
    "teacher": Source,
    "candidate": Source,
    "shadow": Shadowing,
    "canary": CanarySettings,
    "store": Storing,
    "energy": Metering,
    "limits": Limits,
    "batching": Batching,
}


def read(path: Path | None, options: Mapping[str, Any]) -> Serving:
    """Return the settings of a file with options over them; an option's dotted name is a key within a key.

    Raises:
        UserError: every problem with its path, and the nearest name for an unknown key.
    """
    raw = read_yaml(path, "settings") if path else {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no settings; give keys such as student: and teacher:.")
    for name, value in options.items():
        *above, last = name.split(".")
        place = raw
        for key in above:
            held = _source(place.get(key))
            place[key] = held if isinstance(held, dict) else {}
            place = place[key]
        place[last] = value
    return valid(
        TypeAdapter(Serving), raw, str(path or "serve"), lambda at: PLACES.get(str(at[-1]), Serving) if at else Serving
    )


def page() -> str:
    """Return the documentation of settings as Markdown."""
    lines = [
        "# Settings of `slimlmm serve`",
        "",
        "Generated: `python -m slimlmm.serving.settings docs/serve-settings.md`.",
    ]
    lines += fields(Serving, "top level")
    for kind in dict.fromkeys(PLACES.values()):
        lines += fields(kind, ", ".join(name for name, same in PLACES.items() if same is kind))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
