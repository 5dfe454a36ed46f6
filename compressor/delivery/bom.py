"""A manifest in, its bill of materials out: CycloneDX 1.6, with a model card (an ML-BOM).

The library writes the document; its model card, which the library does not know, is added to the JSON. No time and no
random number goes in: the same bundle has the same bill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID

from .. import __version__
from ..device import fields
from ..device.manifest import Manifest
from ..device.metrics import Metric
from ..errors import MissingPackageError

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType

BOM = "bom.cdx.json"
_MODEL, _BASE = "model", "model.dense"  # references within the document
_NO_TIME = datetime(1970, 1, 1, tzinfo=timezone.utc)  # the library wants one


def bill_of_materials(manifest: Manifest) -> bytes:
    """The document of the models and files that the manifest lists."""
    try:
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise MissingPackageError(
            "a bundle's bill of materials needs `cyclonedx-python-lib`; pip install 'compressor[compress]'"
        ) from error

    document: dict[str, Any] = json.loads(JsonV1Dot6(_bom(manifest)).output_as_string())
    del document["metadata"]["timestamp"]
    document["metadata"]["component"]["modelCard"] = _model_card(manifest)
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _bom(manifest: Manifest) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository

    listed = json.dumps(manifest.files, sort_keys=True).encode()
    files = [
        _component(ComponentType.FILE, name, f"file:{name}", listing["sha256"])
        for name, listing in manifest.files.items()
    ]
    data = [_component(ComponentType.DATA, name, f"data:{name}", sha256) for name, sha256 in _data(manifest)]
    tool = Component(name="compressor", version=__version__, type=ComponentType.APPLICATION)
    model = _model(manifest)
    bom = Bom(
        serial_number=UUID(hashlib.sha256(listed).hexdigest()[:32], version=4),
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[tool]), timestamp=_NO_TIME),
        components=[*files, *data],
    )
    bom.register_dependency(model, [*files, *data])
    return bom


def _model(manifest: Manifest) -> Component:
    """The network that ships, made from another."""
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.license import DisjunctiveLicense

    dense = _component(
        ComponentType.MACHINE_LEARNING_MODEL,
        manifest.name,
        _BASE,
        _text(manifest.provenance.get("weights_sha256")),
    )
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=manifest.name,
        bom_ref=_MODEL,
        version=_text(manifest.provenance.get("recipe_sha256"))[:12] or None,
        description=f"{manifest.task} network, budget: {manifest.provenance.get('budget') or 'none'}",
        licenses=[DisjunctiveLicense(name=licence) for licence in manifest.licences],
        pedigree=Pedigree(ancestors=[dense], notes="made smaller by compressor"),
    )


def _component(kind: ComponentType, name: str, reference: str, sha256: str) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component

    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []
    return Component(type=kind, name=name, bom_ref=reference, hashes=hashes)


def _data(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The images that went in, by what they were for, with the hash of their contents."""
    hashes = manifest.provenance.get("data")
    if isinstance(hashes, dict):
        for name, sha256 in hashes.items():
            yield f"{name} data", _text(sha256)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _model_card(manifest: Manifest) -> fields.Object:
    return {
        "modelParameters": {
            "task": manifest.task,
            "modelArchitecture": manifest.name,
            "datasets": [{"ref": f"data:{name}"} for name, _ in _data(manifest)],
            "inputs": [{"format": f"{leaf.name}: {leaf}"} for leaf in manifest.inputs],
            "outputs": [{"format": f"{leaf.name}: {leaf}"} for leaf in manifest.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": [_performance(metric) for metric in manifest.metrics]},
        "considerations": {"technicalLimitations": [f"not checked: {line}" for line in manifest.not_checked]},
    }


def _performance(metric: Metric) -> fields.Object:
    """CycloneDX has numbers as texts."""
    return {
        "type": metric.metric,
        "value": f"{metric.value:.6g}",
        "slice": f"{metric.of} in {metric.runtime}, {metric.n} samples",
        "confidenceInterval": {"lowerBound": f"{metric.low:.6g}", "upperBound": f"{metric.high:.6g}"},
    }
