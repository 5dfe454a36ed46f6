"""A signer by hand, from the formats' texts and not from the library, which can also sign what nobody should accept."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Content = dict[str, Any]
PEM, PUBLIC = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
TYPE = b"application/vnd.in-toto+json"


def write_keys(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """A key pair as PEM files: private, public."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


def statement_of(bundle: Path) -> Content:
    """What is signed: every file but the signature, and a digest of all digests."""
    names = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    resources = [
        {"name": name, "algorithm": "sha256", "digest": hashlib.sha256((bundle / name).read_bytes()).hexdigest()}
        for name in names
        if name != "model.sig"
    ]
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": bundle.name, "digest": {"sha256": ""}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": resources,
        },
    }
    summed_up(statement)
    return statement


def summed_up(statement: Content) -> None:
    """Puts the digest of all digests right."""
    digests = [bytes.fromhex(resource["digest"]) for resource in statement["predicate"]["resources"]]
    statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(b"".join(digests)).hexdigest()


def envelope_of(payload: bytes, private: Path, *, signed: bytes | None = None) -> Content:
    """A sigstore bundle over the payload; `signed` is what is signed in place of its encoding."""
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    algorithm = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
    encoded = b" ".join([b"DSSEv1", str(len(TYPE)).encode(), TYPE, str(len(payload)).encode(), payload])
    signature = key.sign(encoded if signed is None else signed, ec.ECDSA(algorithm))
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(key.public_key().public_bytes(PEM, PUBLIC)).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": TYPE.decode(),
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def sign(bundle: Path, private: Path, change: Callable[[Content], None] = lambda statement: None) -> Path:
    """Signs a statement about the bundle, changed before."""
    statement = statement_of(bundle)
    change(statement)
    (bundle / "model.sig").write_text(json.dumps(envelope_of(json.dumps(statement).encode(), private)))
    return bundle
