"""Whether a bundle is what the owner of a key signed: an OpenSSF Model Signing signature in, the key's hash out.

`model.sig` is a sigstore bundle that holds a DSSE envelope with an in-toto statement over all files of the folder.
Nothing in the statement is read before its signature held, no file of the bundle before its digest did. Needs
`cryptography` and nothing else. Sources: DSSE v1.0.0 (pre-authentication encoding), in-toto Statement v1,
model-signing 1.1 (`https://model_signing/signature/v1.0`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GateError, InputError, MissingPackageError
from . import fields
from .builder import sha256_of
from .built import shipped_files
from .folders import is_plain_file, reason_of
from .manifest import MANIFEST, SIGNATURE, inside

if TYPE_CHECKING:  # on a device it may be missing, and only who has a key needs it
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# what the signer leaves out by itself; a file of these names that is there all the same is one that nobody signed
_LEFT_OUT = {SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore"}
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curves that are signed on, each with the hash that the signer takes there."""

_MOST_BYTES = 1 << 24  # ten thousand files take 3 MB
_MOST_KEY_BYTES = 1 << 16
_SHOWN = 16  # digits of a key's hash in a message
_MOST_SIGNATURE = 1024  # characters; of the largest curve 188
_BUNDLE_FIELDS = ("mediaType", "verificationMaterial", "dsseEnvelope")
_ENVELOPE_FIELDS = ("payload", "payloadType", "signatures")
_SERIALIZATION_FIELDS = ("method", "hash_type", "allow_symlinks", "ignore_paths")


def verify_signature(folder: Path, key: Path) -> str:
    """The sha256 of the public key that signed exactly the files of the folder, engines built on this device aside.

    Raises GateError where nobody or somebody else signed, or a file is not what was signed, InputError for a key that
    is none, MissingPackageError without `cryptography`.
    """
    return verify_signed_by(folder, read_public_key(key))


def verify_signed_by(folder: Path, public_key: EllipticCurvePublicKey) -> str:
    """The same for a key that was read."""
    path = folder / SIGNATURE
    if not path.is_file():
        raise GateError(f"{folder} is not signed: it holds no {SIGNATURE}; get a signed bundle, or leave --key out")
    try:
        payload = _signed_payload(path, public_key)
        digests = _digests(fields.parse_object(payload))
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(f"{path} is no signature that this version can check: {error}; get the bundle again") from error
    _require_files(folder, digests)
    return key_sha256(public_key)


def key_sha256(public_key: EllipticCurvePublicKey) -> str:
    """The hash that a signature names its key by: of the key as PEM."""
    from cryptography.hazmat.primitives import serialization

    pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def pre_authentication_encoding(payload: bytes) -> bytes:
    """What is signed: type and payload, each with its length before it."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """The public key of a PEM file, on one of the three curves that are signed with."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise InputError(f"the key {path} can't be read: {reason_of(error)}") from error
    if b"PRIVATE KEY" in data:
        raise InputError(f"{path} is a private key, which stays where bundles are signed; give its public half")

    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise MissingPackageError(
            "checking a signature needs `cryptography`; pip install 'compressor[device-signed]'"
        ) from error
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} holds no public key in PEM, such as `compressor key` writes") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise InputError(f"{path} is no key on a NIST curve ({', '.join(CURVES)}), such as `compressor key` makes")
    return key


def _signed_payload(path: Path, public_key: EllipticCurvePublicKey) -> bytes:
    """The envelope's payload, once the signature over it held; GateError for another's, ValueError for no envelope."""
    bundle = fields.read_object(path, _MOST_BYTES)
    fields.only(bundle, _BUNDLE_FIELDS, "it")
    _require_is(bundle, "mediaType", _BUNDLE_TYPE)
    envelope = fields.inner(bundle, "dsseEnvelope")
    fields.only(envelope, _ENVELOPE_FIELDS, "its envelope")
    _require_is(envelope, "payloadType", _PAYLOAD_TYPE)
    payload = _decoded(envelope, "payload", most=_MOST_BYTES)
    entry = _only_entry(envelope, "signatures")
    fields.only(entry, ("sig", "keyid"), "its signature")
    signature = _decoded(entry, "sig", most=_MOST_SIGNATURE)

    _require_named(fields.inner(bundle, "verificationMaterial"), key_sha256(public_key))
    if not _is_signed(public_key, signature, payload):
        raise GateError(f"{path} was not made with this key, or was changed since; don't use the bundle")
    return payload


def _is_signed(public_key: EllipticCurvePublicKey, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    algorithm = getattr(hashes, CURVES[public_key.curve.name])
    try:
        public_key.verify(signature, pre_authentication_encoding(payload), ECDSA(algorithm()))
    except InvalidSignature:
        return False
    return True


def _require_named(material: fields.Object, sha256: str) -> None:
    """The key that the signature says it was made with: it proves nothing, but tells what is wrong."""
    if "publicKey" not in material:
        kinds = fields.shown(", ".join(sorted(material)))
        raise ValueError(
            f"it holds {kinds} and names no key; `model_signing verify` checks identities and certificates"
        )
    named = fields.inner(material, "publicKey").get("hint", sha256)
    if named != sha256:
        other = fields.shown(str(named)[:_SHOWN])
        raise GateError(f"the bundle was signed with the key {other}..., not with {sha256[:_SHOWN]}...; don't use it")


def _only_entry(content: fields.Object, key: str) -> fields.Object:
    """The one object in the field's list."""
    (value,) = fields.entries(content, key, least=1, most=1)
    return fields.as_object(value, f"the entry of {key!r}")


def _decoded(content: fields.Object, key: str, *, most: int) -> bytes:
    text = fields.text(content, key, most=most)
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"{key!r} is not in base64") from error


def _require_is(content: fields.Object, key: str, expected: str) -> None:
    value = fields.field(content, key)
    if value != expected:
        raise ValueError(f"its {key} is {fields.shown(value)}, expected {expected!r}")


def _digests(statement: fields.Object) -> dict[str, str]:
    """sha256 by path of all that was signed; ValueError for a statement of another kind."""
    _require_is(statement, "_type", _STATEMENT_TYPE)
    _require_is(statement, "predicateType", _PREDICATE_TYPE)
    predicate = fields.inner(statement, "predicate")
    _require_whole_files(fields.inner(predicate, "serialization"))

    digests: dict[str, str] = {}
    for value in fields.entries(predicate, "resources", least=1):
        resource = fields.as_object(value, "a signed file")
        fields.only(resource, ("name", "algorithm", "digest"), "a signed file")
        _require_is(resource, "algorithm", "sha256")
        name = fields.text(resource, "name", most=1000)
        if str(inside(name)) != name or name in digests:
            raise ValueError(f"it names {fields.shown(name)}, or names it twice")
        digests[name] = fields.sha256(resource, "digest")

    subject = _only_entry(statement, "subject")
    together = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()
    if fields.sha256(fields.inner(subject, "digest"), "sha256") != together:
        raise ValueError("its digest of all files is not that of the files it lists")
    if MANIFEST not in digests:
        raise ValueError(f"it does not cover {MANIFEST}")
    return digests


def _require_whole_files(serialization: fields.Object) -> None:
    """ValueError unless every file was hashed as a whole, by sha256, and none was left out but the signature."""
    fields.only(serialization, _SERIALIZATION_FIELDS, "its serialization")
    _require_is(serialization, "method", "files")
    _require_is(serialization, "hash_type", "sha256")
    if fields.flag(serialization, "allow_symlinks"):
        raise ValueError("it lets links stand for files")
    left_out = fields.texts({"ignore_paths": [], **serialization}, "ignore_paths")
    foreign = sorted(set(left_out) - _LEFT_OUT)
    if foreign:
        raise ValueError(f"it leaves out {fields.shown(foreign[0])}, which nobody vouches for then")


def _require_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises GateError unless the folder's files are those that were signed, all of them and no others."""
    present = set(shipped_files(folder)) - {SIGNATURE}
    for name in sorted(present - digests.keys()):
        raise GateError(f"{folder / name} was not signed; remove it, nobody vouches for it")
    for name, digest in digests.items():
        path = folder / name
        if not is_plain_file(path):
            raise GateError(f"{name} was signed and is missing, or is a link; get the bundle again")
        if sha256_of(path) != digest:
            raise GateError(f"{name} is not what was signed: its sha256 differs; don't use the bundle")
