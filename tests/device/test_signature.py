"""Signatures on the device: what the owner of a key signed passes, anything else is one line and runs nothing."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from compressor.device import bundle as bundles
from compressor.device.bundle import require_signed, verify_bundle
from compressor.device.signature import verify_signature
from compressor.errors import GateError, InputError, MissingPackageError

from .conftest import Command, small_model
from .signing import PEM, PUBLIC, Content, envelope_of, sign, statement_of, summed_up, write_keys
from .tampering import put, replace_file
from .test_attacks import MODEL, QUICK, assert_refused, plant
from .test_fuzzing import assert_held, exchanged, mutated

Keys = tuple[Path, Path]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_keys(tmp_path_factory.mktemp("keys"), "owner")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return write_keys(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture
def runs_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would read a manifest or open a model is a failure of the test."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("something of the bundle was read before its signature held")

    for name in ("read_bundle", "open_model", "read_golden", "read_built"):
        monkeypatch.setattr(bundles, name, refuse)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_was_signed_passes_and_says_by_whom(bundle: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = write_keys(tmp_path, "key", curve)
    sign(bundle, private)
    report = verify_bundle(bundle, key=public)
    hint = json.loads((bundle / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"]
    assert report.passed
    assert report.signed_by == require_signed(bundle, public) == hint


def test_the_words_say_what_a_verification_shows(bundle: Path, keys: Keys, command: Command) -> None:
    private, public = keys
    assert command("verify", bundle).out.splitlines()[-1].startswith("integrity only: the bundle is not signed")
    sign(bundle, private)
    assert command("verify", bundle).out.splitlines()[-1].startswith("integrity only: the bundle is signed, and its")
    signed = json.loads(command("verify", bundle, "--key", public, "--json").out)
    assert (signed["passed"], signed["trust"]) == (True, f"signed by the owner of the key {signed['signed_by']}")


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("verb", ["verify", "run", "build", "benchmark"])
def test_an_unsigned_bundle_is_refused_where_a_key_is_given(
    bundle: Path,
    keys: Keys,
    image: Path,
    command: Command,
    verb: str,
) -> None:
    inputs = (image,) if verb == "run" else ()
    assert_refused(command(verb, bundle, *inputs, "--key", keys[1]), "is not signed: it holds no model.sig")


@pytest.mark.usefixtures("runs_nothing")
def test_another_key_is_refused(bundle: Path, keys: Keys, other_keys: Keys) -> None:
    sign(bundle, keys[0])
    with pytest.raises(GateError, match=r"signed with the key .* not with"):
        verify_bundle(bundle, key=other_keys[1])
    path = bundle / "model.sig"
    content = json.loads(path.read_text())
    content["verificationMaterial"]["publicKey"] = {}  # a forger does not say whose key it was
    path.write_text(json.dumps(content))
    with pytest.raises(GateError, match="was not made with this key"):
        verify_bundle(bundle, key=other_keys[1])


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("name", [MODEL, "golden.npz", "manifest.json", "model.sig"])
def test_a_byte_of_any_file_is_noticed(bundle: Path, keys: Keys, name: str) -> None:
    sign(bundle, keys[0])
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match=name):
        verify_bundle(bundle, key=keys[1])


def test_what_a_forger_puts_right_everywhere_is_refused_by_the_signature_alone(bundle: Path, keys: Keys) -> None:
    """The digest of a manifest takes no secret."""
    sign(bundle, keys[0])
    put(bundle, "labels|0", "wolf")
    assert verify_bundle(bundle).passed
    with pytest.raises(GateError, match=r"manifest\.json is not what was signed"):
        verify_bundle(bundle, key=keys[1])
    sign(bundle, keys[0])
    replace_file(bundle, MODEL, small_model().SerializeToString() + b"\x32\x00")  # one more byte pair, an empty name
    assert verify_bundle(bundle).passed
    with pytest.raises(GateError, match="is not what was signed"):
        verify_bundle(bundle, key=keys[1])


def test_a_file_of_another_signed_bundle_is_refused(bundle: Path, tmp_path: Path, keys: Keys) -> None:
    other = tmp_path / "other.bundle"
    shutil.copytree(bundle, other)
    replace_file(other, MODEL, small_model(seed=1).SerializeToString())
    for signed in (bundle, other):
        sign(signed, keys[0])
    shutil.copyfile(other / MODEL, bundle / MODEL)
    for key in (None, keys[1]):
        with pytest.raises(GateError, match=r"small.onnx"):
            _require_passed(bundle, key)
    shutil.copyfile(other / "model.sig", bundle / "model.sig")
    with pytest.raises(GateError, match="is not what was signed"):
        verify_bundle(bundle, key=keys[1])


def _require_passed(bundle: Path, key: Path | None) -> None:
    report = verify_bundle(bundle, key=key)
    failed = [check.what for check in report.checks if check.outcome == "failed"]
    if failed:
        raise GateError(failed[0])


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("fault", ["extra", "hidden", "missing", "linked", "linked folder"])
def test_the_files_are_those_that_were_signed(bundle: Path, tmp_path: Path, keys: Keys, fault: str) -> None:
    sign(bundle, keys[0])
    if fault == "extra":
        (bundle / "models" / "more.bin").write_bytes(b"x")
    elif fault == "hidden":
        (bundle / ".git").mkdir()
        (bundle / ".git" / "hook").write_bytes(b"x")
    elif fault == "missing":
        (bundle / MODEL).unlink()
    elif fault == "linked":
        (bundle / MODEL).rename(tmp_path / "elsewhere")
        (bundle / MODEL).symlink_to(tmp_path / "elsewhere")
    else:
        (bundle / "models").rename(tmp_path / "elsewhere")
        (bundle / "models").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GateError, match=r"was not signed|is missing, or is a link"):
        verify_bundle(bundle, key=keys[1])


def test_a_linked_signature_is_refused(bundle: Path, tmp_path: Path, keys: Keys) -> None:
    sign(bundle, keys[0])
    (bundle / "model.sig").rename(tmp_path / "elsewhere")
    (bundle / "model.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GateError, match="is a link"):
        verify_bundle(bundle, key=keys[1])
    assert not verify_bundle(bundle).passed


@pytest.mark.usefixtures("engines_run")
def test_an_engine_that_no_signature_covers_does_not_run(
    bundle: Path,
    keys: Keys,
    image: Path,
    command: Command,
) -> None:
    sign(bundle, keys[0])
    plant(bundle)
    lines = [check for check in verify_bundle(bundle, key=keys[1]).checks if "built" in check.what]
    assert [(check.outcome, check.detail) for check in lines] == [
        ("not run", "built on a device: no signature covers it")
    ]
    for words in (("run", bundle, image), ("benchmark", bundle, *QUICK), ("build", bundle)):
        assert_refused(command(*words, "--key", keys[1]), "no signature covers it")


# --- statements that are signed and say something else ---------------------------------------------------------------


def predicate(**fields: Any) -> Callable[[Content], None]:
    return lambda statement: statement["predicate"].update(fields)


def serialization_of(**fields: Any) -> Callable[[Content], None]:
    return lambda statement: statement["predicate"]["serialization"].update(fields)


def resource(index: int, **fields: Any) -> Callable[[Content], None]:
    def change(statement: Content) -> None:
        statement["predicate"]["resources"][index].update(fields)

    return change


def without(name: str) -> Callable[[Content], None]:
    def change(statement: Content) -> None:
        resources = statement["predicate"]["resources"]
        statement["predicate"]["resources"] = [entry for entry in resources if entry["name"] != name]
        summed_up(statement)

    return change


def doubled(statement: Content) -> None:
    resources = statement["predicate"]["resources"]
    resources.append(resources[0])
    summed_up(statement)


STATEMENTS: dict[str, tuple[Callable[[Content], None], str]] = {
    "another statement": (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "its _type"),
    "another predicate": (lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), "predicateType"),
    "no predicate": (lambda s: s.pop("predicate"), "predicate"),
    "no files": (predicate(resources=[]), "resources"),
    "files that are none": (predicate(resources={"a": "b"}), "resources"),
    "shards": (serialization_of(method="shards", shard_size=1000), "shard_size"),
    "another method": (serialization_of(method="shards"), "its method"),
    "another hash": (serialization_of(hash_type="blake2b"), "its hash_type"),
    "links": (serialization_of(allow_symlinks=True), "links stand for files"),
    "what is left out": (serialization_of(ignore_paths=[MODEL]), "leaves out"),
    "a folder that is left out": (serialization_of(ignore_paths=["model.sig", "models"]), "leaves out 'models'"),
    "a file's other hash": (resource(0, algorithm="blake2b"), "its algorithm"),
    "a file's short hash": (resource(0, digest="ab"), "digest"),
    "a file outside": (resource(0, name="../golden.npz"), "lies outside"),
    "an absolute file": (resource(0, name="/etc/passwd"), "lies outside"),
    "a second name": (resource(0, name="./golden.npz"), "golden.npz"),
    "a file twice": (doubled, "names it twice"),
    "a digest of others": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "digest of all files"),
    "two subjects": (lambda s: s["subject"].append(s["subject"][0]), "subject"),
    "no manifest": (without("manifest.json"), "does not cover manifest.json"),
    "no model": (without(MODEL), "was not signed"),
}


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_signed_statement_of_something_else_is_refused(
    bundle: Path,
    keys: Keys,
    command: Command,
    name: str,
) -> None:
    change, words = STATEMENTS[name]
    sign(bundle, keys[0], change)
    assert_refused(command("verify", bundle, "--key", keys[1]), words)


def test_what_the_signers_own_list_leaves_out_is_refused_where_it_is_there(bundle: Path, keys: Keys) -> None:
    sign(bundle, keys[0], serialization_of(ignore_paths=["model.sig", ".git", ".gitignore"]))
    assert verify_bundle(bundle, key=keys[1]).passed
    (bundle / ".gitignore").write_text("models\n")
    with pytest.raises(GateError, match=r"\.gitignore was not signed"):
        verify_bundle(bundle, key=keys[1])


# --- envelopes ---------------------------------------------------------------------------------------------------

ENVELOPES: dict[str, tuple[Callable[[Content], object], str]] = {
    "another media type": (
        lambda e: e.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.1"),
        "mediaT",
    ),
    "more fields": (lambda e: e.update(more=1), "'more'"),
    "no material": (lambda e: e.pop("verificationMaterial"), "verificationMaterial"),
    "an identity": (lambda e: e.update(verificationMaterial={"certificate": {"rawBytes": "AAAA"}}), "names no key"),
    "a certificate": (lambda e: e.update(verificationMaterial={"x509CertificateChain": {}}), "names no key"),
    "another payload type": (lambda e: e["dsseEnvelope"].update(payloadType="text/plain"), "payloadType"),
    "no signature": (lambda e: e["dsseEnvelope"].update(signatures=[]), "signatures"),
    "two signatures": (
        lambda e: e["dsseEnvelope"].update(signatures=2 * e["dsseEnvelope"]["signatures"]),
        "signatures",
    ),
    "an empty signature": (lambda e: e["dsseEnvelope"]["signatures"][0].update(sig=""), "not made with this key"),
    "a signature in other letters": (lambda e: e["dsseEnvelope"]["signatures"][0].update(sig="*" * 96), "base64"),
    "a long signature": (lambda e: e["dsseEnvelope"]["signatures"][0].update(sig="A" * 5000), "'sig'"),
    "another payload": (lambda e: e["dsseEnvelope"].update(payload="e30="), "not made with this key"),
    "no envelope": (lambda e: e.update(dsseEnvelope=None), "dsseEnvelope"),
}


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("name", ENVELOPES)
def test_another_envelope_is_refused(
    bundle: Path,
    keys: Keys,
    command: Command,
    name: str,
) -> None:
    change, words = ENVELOPES[name]
    envelope = envelope_of(json.dumps(statement_of(bundle)).encode(), keys[0])
    change(envelope)
    (bundle / "model.sig").write_text(json.dumps(envelope))
    assert_refused(command("verify", bundle, "--key", keys[1]), words)


def test_only_the_encoding_of_type_and_payload_counts_as_signed(bundle: Path, keys: Keys) -> None:
    payload = json.dumps(statement_of(bundle)).encode()
    path = bundle / "model.sig"
    path.write_text(json.dumps(envelope_of(payload, keys[0])))
    verify_signature(bundle, keys[1])
    for signed in (payload, b"DSSEv1 28 application/vnd.in-toto+json " + payload):
        path.write_text(json.dumps(envelope_of(payload, keys[0], signed=signed)))
        with pytest.raises(GateError, match="not made with this key"):
            verify_signature(bundle, keys[1])


@pytest.mark.parametrize("payload", [b"", b"[]", b"5", b"\xff\xfe", b"{" * 5000, b'{"_type": 1, "_type": 2}'])
def test_a_signed_payload_that_is_no_statement_is_refused(bundle: Path, keys: Keys, payload: bytes) -> None:
    (bundle / "model.sig").write_text(json.dumps(envelope_of(payload, keys[0])))
    with pytest.raises(GateError, match="no signature that this version can check"):
        verify_signature(bundle, keys[1])


def test_signatures_of_damaged_bytes(bundle: Path, keys: Keys) -> None:
    path = sign(bundle, keys[0]) / "model.sig"
    whole = path.read_bytes()
    assert_held(lambda draw: _write(path, mutated(whole, draw)), lambda: verify_signature(bundle, keys[1]))


def test_signatures_and_statements_of_exchanged_values(bundle: Path, keys: Keys) -> None:
    path, statement = bundle / "model.sig", statement_of(bundle)
    envelope = envelope_of(json.dumps(statement).encode(), keys[0])

    def change(draw: random.Random) -> None:
        if draw.random() < 0.5:
            path.write_text(json.dumps(exchanged(envelope, draw)))
        else:
            payload = json.dumps(exchanged(statement, draw)).encode()
            path.write_text(json.dumps(envelope_of(payload, keys[0])))

    assert_held(change, lambda: verify_signature(bundle, keys[1]), 150)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# --- keys --------------------------------------------------------------------------------------------------------


def _pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(PEM, PUBLIC))


KEYS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "other bytes": lambda: bytes(range(256)),
    "a cut key": lambda: _pem(ec.generate_private_key(ec.SECP256R1()))[:90],
    "DER": lambda: base64.b64decode(b"".join(_pem(ec.generate_private_key(ec.SECP256R1())).splitlines()[1:-1])),
    "ed25519": lambda: _pem(ed25519.Ed25519PrivateKey.generate()),
    "RSA": lambda: _pem(rsa.generate_private_key(65537, 2048)),
    "another curve": lambda: _pem(ec.generate_private_key(ec.SECP256K1())),
}


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_is_none_is_named(bundle: Path, keys: Keys, tmp_path: Path, name: str) -> None:
    sign(bundle, keys[0])
    (tmp_path / "key.pem").write_bytes(KEYS[name]())
    with pytest.raises(InputError, match=r"key\.pem .*`compressor key`"):
        verify_bundle(bundle, key=tmp_path / "key.pem")


def test_a_private_key_is_not_what_checks(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    sign(bundle, keys[0])
    with pytest.raises(InputError, match="is a private key"):
        verify_bundle(bundle, key=keys[0])
    with pytest.raises(InputError, match="can't be read"):
        verify_bundle(bundle, key=tmp_path / "none.pem")


def test_without_the_library_a_device_says_what_to_install(
    bundle: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(bundle, keys[0])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"compressor\[device-signed\]"):
        verify_bundle(bundle, key=keys[1])
    assert verify_bundle(bundle).passed  # hashes need no library


def test_the_signers_encoding_is_the_formats_own() -> None:
    """Checked here, since every refusal above relies on it: DSSE's text has this form for its own example."""
    from compressor.device.signature import pre_authentication_encoding

    assert pre_authentication_encoding(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"
