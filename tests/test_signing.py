"""Signing on the host: keys that are never replaced, and signatures that `model_signing` and devices both accept."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from compressor.__main__ import main
from compressor.device.archive import pack_bundle, unpack_bundle
from compressor.device.bundle import Manifest, ModelFile, verify_bundle, write_bundle
from compressor.device.signature import verify_signature
from compressor.errors import FolderError, GateError, InputError, MissingPackageError
from compressor.signing import exposure, make_key, sign_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One whose model no runtime opens: nobody signs what a model computes."""
    (tmp_path / "model.bin").write_bytes(b"model")
    images = np.zeros((2, 4), np.float32)
    manifest = Manifest("small", (ModelFile("models/m.onnx"),), preprocessing=None, task="any")
    files = {"models/m.onnx": tmp_path / "model.bin"}
    return write_bundle(tmp_path / "b", files, manifest=manifest, golden_inputs=images, golden_outputs=images)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private = tmp_path / "release.pem"
    public, _ = make_key(private)
    return private, public


def library(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_we_sign_the_library_accepts_and_the_other_way_round(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    signature = bundle / "model.sig"
    signed_by = sign_bundle(bundle, private)
    verified = library("verify", "key", bundle, "--signature", signature, "--public_key", public)
    assert (verified.returncode, "succeeded" in verified.stdout + verified.stderr) == (0, True), verified

    signature.unlink()
    assert library("sign", "key", bundle, "--private_key", private, "--signature", signature).returncode == 0
    assert verify_signature(bundle, public) == signed_by

    (bundle / "models" / "m.onnx").write_bytes(b"Model")
    assert library("verify", "key", bundle, "--signature", signature, "--public_key", public).returncode != 0
    with pytest.raises(GateError, match="not what was signed"):
        verify_signature(bundle, public)


def test_the_verbs_make_a_key_and_sign(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def answer(words: Sequence[str]) -> dict[str, str]:
        assert main(words) == 0
        content: dict[str, str] = json.loads(capsys.readouterr().out)
        return content

    key = answer(["key", "release.pem"])
    assert (key["private"], key["public"]) == ("release.pem", "release.pub.pem")
    assert stat.S_IMODE((tmp_path / "release.pem").stat().st_mode) == 0o600
    signed = answer(["sign", "b", "--key", "release.pem"])
    assert signed == {"bundle": "b", "signature": "b/model.sig", "signed_by": key["sha256"]}
    assert verify_bundle(bundle, key=tmp_path / "release.pub.pem").signed_by == key["sha256"]
    assert main(["key", "release.pem"]) == 2
    assert "never replaced" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["release.pem", "release.pub.pem"])
def test_a_key_is_never_replaced_by_half_a_pair(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FolderError, match="never replaced"):
        make_key(tmp_path / "release.pem")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_key_in_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in ("none", "file"):
        with pytest.raises(FolderError, match="can't write"):
            make_key(tmp_path / folder / "release.pem")
    for folder in (tmp_path, Path(".")):
        with pytest.raises(FolderError, match="name a file"):
            make_key(folder)


def test_signing_again_takes_the_earlier_signature_away(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign_bundle(bundle, keys[0])
    public, _ = make_key(tmp_path / "next.pem")
    assert sign_bundle(bundle, tmp_path / "next.pem") == verify_signature(bundle, public)
    with pytest.raises(GateError, match="signed with the key"):
        verify_signature(bundle, keys[1])


@pytest.mark.parametrize("fault", ["changed", "more", "built"])
def test_only_a_whole_bundle_is_signed(bundle: Path, keys: tuple[Path, Path], fault: str) -> None:
    if fault == "changed":
        (bundle / "models" / "m.onnx").write_bytes(b"Model")
    elif fault == "more":
        (bundle / ".gitignore").write_text("models")
    else:
        (bundle / "built").mkdir()
        (bundle / "built" / "x.plan").write_bytes(b"engine")
    with pytest.raises(
        (GateError, FolderError), match=r"was changed|not in the bundle's manifest|built on this device"
    ):
        sign_bundle(bundle, keys[0])
    assert not (bundle / "model.sig").exists()


def test_a_bundle_that_changes_while_it_is_signed_has_no_signature(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor import signing

    made = signing._sign

    def sign_and_change(folder: Path, key: Path, path: Path, password: bytes) -> None:
        made(folder, key, path, password)
        (folder / "models" / "m.onnx").write_bytes(b"Model")

    monkeypatch.setattr(signing, "_sign", sign_and_change)
    with pytest.raises(GateError, match="not what was signed"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / "model.sig").exists()


def test_a_key_that_cannot_sign_is_named(bundle: Path, tmp_path: Path) -> None:
    form, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    locked = serialization.BestAvailableEncryption(b"secret")
    plain = serialization.NoEncryption()
    keys = {
        "no private key": b"x",
        "NIST curve": ed25519.Ed25519PrivateKey.generate().private_bytes(pem, form, plain),
        "locked with a password": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, form, locked),
    }
    for words, data in keys.items():
        (tmp_path / "key.pem").write_bytes(data)
        with pytest.raises(InputError, match=words):
            sign_bundle(bundle, tmp_path / "key.pem")
    with pytest.raises(InputError, match="can't be read"):
        sign_bundle(bundle, tmp_path / "none.pem")


@pytest.fixture
def locked(tmp_path: Path) -> tuple[Path, Path]:
    private = tmp_path / "locked.pem"
    public, _ = make_key(private, b"secret")
    return private, public


def test_a_locked_key_signs_for_who_knows_its_password(
    bundle: Path, locked: tuple[Path, Path], keys: tuple[Path, Path]
) -> None:
    private, public = locked
    assert b"ENCRYPTED PRIVATE KEY" in private.read_bytes()
    for password, words in ((b"", "is locked with a password"), (b"Secret", "the password does not open")):
        with pytest.raises(InputError, match=words):
            sign_bundle(bundle, private, password)
    assert not (bundle / "model.sig").exists()
    with pytest.raises(InputError, match="has no password"):
        sign_bundle(bundle, keys[0], b"secret")

    assert sign_bundle(bundle, private, b"secret") == verify_signature(bundle, public)
    verified = library("verify", "key", bundle, "--signature", bundle / "model.sig", "--public_key", public)
    assert (verified.returncode, "succeeded" in verified.stdout + verified.stderr) == (0, True), verified


Typed = Callable[..., list[str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A terminal on which these lines are typed; what it asked comes back."""

    def type_in(*lines: str) -> list[str]:
        asked: list[str] = []
        left = list(lines)

        def answer(prompt: str) -> str:
            asked.append(prompt)
            return left.pop(0)

        monkeypatch.setattr("getpass.getpass", answer)
        return asked

    return type_in


def test_a_password_is_asked_for_where_a_key_is_made_and_where_it_signs(
    bundle: Path, tmp_path: Path, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "asked.pem"
    typed("one", "other")
    assert main(["key", str(key), "--password"]) == 2
    assert ("differ" in capsys.readouterr().err, key.exists()) == (True, False)
    typed("", "")
    assert main(["key", str(key), "--password"]) == 2
    assert ("is empty" in capsys.readouterr().err, key.exists()) == (True, False)

    assert len(typed("secret", "secret")) == 0
    assert main(["key", str(key), "--password"]) == 0
    asked = typed("secret")
    assert main(["sign", str(bundle), "--key", str(key)]) == 0
    assert asked == [f"password of {key}: "]
    typed("wrong")
    assert main(["sign", str(bundle), "--key", str(key)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: the password does not open {key}; nothing was signed"]


def test_a_password_comes_from_where_the_user_says(
    bundle: Path, locked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PASSWORD_OF_THE_KEY", "secret")
    sign = ["sign", str(bundle), "--key", str(locked[0]), "--password-from"]
    assert main([*sign, "env:PASSWORD_OF_THE_KEY"]) == 0
    end, start = os.pipe()
    os.write(start, b"secret\nanother line")
    assert main([*sign, f"fd:{end}"]) == 0
    capsys.readouterr()
    os.close(start)
    for source, words in {
        "env:NO_SUCH_VARIABLE": "is not set",
        f"fd:{end}": "can't be read",  # closed by now
        "fd:999999999": "can't be read",
        "fd:" + 30 * "9": "takes env:NAME",
        "hunter2": "takes env:NAME",
        "fd:x": "takes env:NAME",
    }.items():
        assert main([*sign, source]) == 2
        error = capsys.readouterr().err
        assert (words in error, error.count("\n"), "hunter2" in error) == (True, 1, False), error


def test_without_a_terminal_nobody_is_asked(
    bundle: Path, locked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(prompt: str) -> str:
        warnings.warn("Can not control echo on the terminal.", getpass.GetPassWarning, stacklevel=2)
        return "secret"

    monkeypatch.setattr("getpass.getpass", shown)
    assert main(["sign", str(bundle), "--key", str(locked[0])]) == 2
    assert "no terminal to ask on; --password-from env:NAME" in capsys.readouterr().err


def test_a_run_is_told_of_a_wrong_password_before_it_begins(
    locked: tuple[Path, Path], tmp_path: Path, typed: Typed, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("wrong")
    out = tmp_path / "run"
    assert main(["compress", "--signing-key", str(locked[0]), "--out", str(out)]) == 2
    assert "the password does not open" in capsys.readouterr().err
    assert not out.exists()
    assert main(["compress", "--password-from", "env:X", "--out", str(out)]) == 2
    assert "give --signing-key, or leave it out" in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingPackageError, match=r"compressor\[sign\]"):
        sign_bundle(bundle, keys[0])
    assert not (bundle / "model.sig").exists()


def test_a_run_is_told_of_a_key_that_cannot_sign_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["compress", "--signing-key", str(tmp_path / "none.pem"), "--out", str(out)]) == 2
    assert "`compressor key` makes one" in capsys.readouterr().err
    assert not out.exists()


def test_a_runs_bundle_is_signed_where_there_is_a_key(
    bundle: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor import pipeline
    from compressor.cli import tables

    run = SimpleNamespace(folder=bundle.parent / "run", summary={"model": "small"})
    run.folder.mkdir()
    bundle.rename(run.folder / "bundle")
    monkeypatch.setattr(pipeline, "run", lambda recipe, notify: run)
    monkeypatch.setattr(tables, "compressed", lambda finished: None)
    assert main(["compress", "--signing-key", str(keys[0]), "--quiet"]) == 0
    assert verify_signature(run.folder / "bundle", keys[1])


def certificate(folder: Path) -> tuple[Path, Path, Path]:
    """A private key, a certificate of it, and the authority that gave it, as an organisation has them."""
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("authority", "release")]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    now = datetime.datetime.now(datetime.timezone.utc)
    signs = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    grants = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    paths = folder / "certified.pem", folder / "certificate.pem", folder / "authority.pem"
    paths[0].write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    for path, name, key, usage, is_authority in (
        (paths[2], names[0], keys[0], grants, True),
        (paths[1], names[1], keys[1], signs, False),
    ):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(names[0]).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1)).add_extension(usage, critical=True)
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        if not is_authority:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING])
            builder = builder.add_extension(purpose, critical=False)
        certified = builder.sign(keys[0], hashes.SHA256())
        path.write_bytes(certified.public_bytes(serialization.Encoding.PEM))
    return paths


def test_a_signature_of_another_kind_stands_beside_a_bundle_and_its_key(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """An identity's needs the network; a certificate's is laid out in the same way and does not."""
    from model_signing import hashing, signing, verifying

    private, signed_certificate, authority = certificate(tmp_path)
    sign_bundle(bundle, keys[0])
    beside = tmp_path / "b.sigstore.json"
    hashed = hashing.Config().set_ignored_paths(paths=[beside], ignore_git_paths=True)
    signer = signing.Config().set_hashing_config(hashed)
    signer.use_certificate_signer(
        private_key=private, signing_certificate=signed_certificate, certificate_chain=[authority]
    ).sign(bundle, beside)

    there = unpack_bundle(pack_bundle(bundle), tmp_path / "there" / "bundle")
    verifier = verifying.Config().use_certificate_verifier(certificate_chain=[authority])
    verifier.verify(there, beside)
    assert verify_signature(there, keys[1])
    shutil.copy(beside, there / "model.sig")  # in the key's place it is none that a device checks
    with pytest.raises(GateError, match="names no key; `model_signing verify` checks identities and certificates"):
        verify_signature(there, keys[1])
    with pytest.raises(ValueError, match="mismatch"):
        verifier.verify(there, beside)


def test_a_key_that_others_can_read_is_told(tmp_path: Path) -> None:
    make_key(tmp_path / "release.pem")
    assert exposure(tmp_path / "release.pem") == ""
    (tmp_path / "release.pem").chmod(0o640)
    assert "chmod 600" in exposure(tmp_path / "release.pem")
