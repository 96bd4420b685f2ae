"""Energy of a model as SPDX 3.0.1 tells it: an AI package with `energyConsumption`, as JSON-LD.

Names are those of the specification's AI profile: `ai_AIPackage`, `ai_EnergyConsumption` with `ai_inferenceEnergyConsumption` and
`ai_finetuningEnergyConsumption`, each a list of `ai_EnergyConsumptionDescription` (`ai_energyQuantity`, `ai_energyUnit`). The
profile has no field for what a quantity is of, nor for how it was found, so the package's comment says both.
"""

from __future__ import annotations

import datetime
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

from slimlmm import __version__
from slimlmm.annual import KWH, Annual
from slimlmm.errors import UserError

CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
VERSION = "3.0.1"


def document(found: Annual, created: datetime.datetime) -> dict[str, Any]:
    """Return the SPDX document of the second deployment's model.

    Inference: joules of the device for one request / 3.6e6 [kWh]; fine-tuning: joules of the device for the compression / 3.6e6
    [kWh], left out where it was not given. Training of the first model is not known here, so it is left out.
    The document claims the profiles core and software: the AI profile also wants a supplier, a release time, a download location
    and a version, which only the publisher knows.
    """
    one, run = found.after, found.compression
    base = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, found.model_dump_json())}"
    consumption: dict[str, Any] = {
        "type": "ai_EnergyConsumption",
        "ai_inferenceEnergyConsumption": [_kilowatt_hours(one.joules)],
    }
    told = [
        f"Inference: kilowatt-hours of the device for one request, {one.basis} ({one.source}), idle time not included."
    ]
    if run is not None:
        consumption["ai_finetuningEnergyConsumption"] = [_kilowatt_hours(run.joules)]
        told.append(f"Fine-tuning: kilowatt-hours of the device for the whole compression, {run.basis}.")
    about = {"creationInfo": "_:creation"}
    graph = [
        {
            "type": "CreationInfo",
            "@id": "_:creation",
            "specVersion": VERSION,
            "created": created.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "createdBy": [f"{base}#slimlmm"],
        },
        {"type": "SoftwareAgent", "spdxId": f"{base}#slimlmm", "name": f"slimlmm {__version__}", **about},
        {
            "type": "ai_AIPackage",
            "spdxId": f"{base}#model",
            "name": one.name,
            "comment": " ".join(told),
            "software_primaryPurpose": "model",
            "ai_energyConsumption": consumption,
            **about,
        },
        {
            "type": "SpdxDocument",
            "spdxId": f"{base}#document",
            "profileConformance": ["core", "software"],
            "rootElement": [f"{base}#model"],
            **about,
        },
    ]
    return {"@context": CONTEXT, "@graph": graph}


def write(found: Annual, path: Path) -> None:
    """Write the document, dated now.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(document(found, datetime.datetime.now(datetime.UTC)), indent=1) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--spdx {path}: cannot be written ({error.strerror}).") from error


def _kilowatt_hours(joules: float) -> dict[str, str]:
    """Return a quantity; an xsd:decimal has no exponent, so the digits are written out."""
    return {
        "type": "ai_EnergyConsumptionDescription",
        "ai_energyQuantity": format(Decimal(f"{joules / KWH:.6g}"), "f"),
        "ai_energyUnit": "kilowattHour",
    }
