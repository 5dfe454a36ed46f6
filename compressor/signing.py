"""A bundle and a private key in, its signature out: OpenSSF Model Signing, checked before it counts.

The signature is made by `model-signing` and checked by the verifier that devices have. Keys are ECDSA on a NIST curve,
in PEM. Knows nothing of what a bundle holds; a private key is read here only, and never written anywhere but here.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .device.built import engine_files
from .device.bundle import read_bundle, verify_files
from .device.manifest import SIGNATURE
from .device.signature import CURVES, key_sha256, verify_signed_by
from .errors import CompressorError, FolderError, InputError, MissingPackageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_REMEDY = "pip install 'compressor[sign]'"


def make_key(path: Path, password: bytes = b"") -> tuple[Path, str]:
    """Writes a new private key to `path`, for its owner's eyes alone, and its public half beside it.

    It is locked with the `password` where there is one (PKCS #8, PBES2). Returns the public half's path and sha256.
    Raises FolderError where one of the files is there already: a key that is replaced can't be had again.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
        from cryptography.hazmat.primitives.serialization import (
            BestAvailableEncryption,
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )
    except ImportError as error:
        raise MissingPackageError(f"making a key needs `cryptography`; {_REMEDY}") from error

    if path.is_dir():
        raise FolderError(f"{path} is a folder; name a file, such as {path / 'release.pem'}")
    key = generate_private_key(SECP256R1())
    lock = BestAvailableEncryption(password) if password else NoEncryption()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public_path = path.with_name(f"{path.stem}.pub{path.suffix or '.pem'}")
    for place in (path, public_path):  # both, before one of them is written
        if place.exists() or place.is_symlink():
            raise _taken(place)
    _write_new(path, private, mode=0o600)
    try:
        _write_new(public_path, public, mode=0o644)
    except FolderError:
        path.unlink(missing_ok=True)
        raise
    return public_path, key_sha256(key.public_key())


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    """A file that was not there, with these rights from its first byte on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _taken(path: Path) -> FolderError:
    return FolderError(f"{path} is there already; keys are never replaced, choose another name")


def _unwritable(path: Path, error: OSError) -> FolderError:
    return FolderError(f"can't write {path}: {error.strerror or error}")


def sign_bundle(folder: Path | str, key: Path, password: bytes = b"") -> str:
    """Signs all files of a whole, unchanged bundle, over an earlier signature; the sha256 of the key that signed.

    `password` opens a key that is locked. Raises what `read_bundle` and `verify_files` raise, InputError for a key that
    can't sign, FolderError where engines built on this device lie in the bundle: they would be signed for every device.
    """
    folder = Path(folder)
    verify_files(folder, read_bundle(folder))
    for engine in engine_files(folder):
        raise FolderError(f"{engine} was built on this device and is no part of the bundle; remove it, then sign")
    public_key = _read_private_key(key, password).public_key()

    path = folder / SIGNATURE
    try:
        # beside the bundle: in it, the scratch file would be signed too
        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".sign-") as scratch:
            made = Path(scratch) / SIGNATURE
            _sign(folder, key, made, password)
            os.replace(made, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        return verify_signed_by(folder, public_key)
    except CompressorError:  # the bundle was changed meanwhile
        path.unlink(missing_ok=True)
        raise


def require_signer(key: Path, password: bytes = b"") -> None:
    """Raises what `sign_bundle` would raise for this key, or for what is not installed."""
    _read_private_key(key, password)
    _load_library()


def exposure(key: Path) -> str:
    """What to do where others than the private key's owner can read it; empty where nobody can."""
    if os.name == "nt" or not key.stat().st_mode & 0o044:
        return ""
    return f"others than its owner can read {key}: chmod 600 {key}, and make another where they may have"


def is_locked(key: Path) -> bool:
    """Whether a password is needed to read the private key; False for what is none, which signing refuses."""
    try:
        _loaded(_content(key), b"")
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def _sign(folder: Path, key: Path, made: Path, password: bytes) -> None:
    """The signature over everything in the folder but an earlier one, as a file."""
    hashing, signing = _load_library()
    # nothing else is left out, as it would be by itself: what was left out would be signed by nobody
    hashed = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    config = signing.Config().set_hashing_config(hashed)
    # bytes, although it says text: the library hands it on as it is, and `cryptography` takes nothing else
    config.use_elliptic_key_signer(private_key=key, password=password or None).sign(folder, made)


def _load_library() -> tuple[ModuleType, ModuleType]:
    """Its modules for hashing and for signing."""
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise MissingPackageError(f"signing needs `model-signing` and `pyopenssl`; {_REMEDY}") from error
    return hashing, signing


def _read_private_key(path: Path, password: bytes) -> EllipticCurvePrivateKey:
    """The private key of a PEM file, on one of the three curves that are signed with."""
    try:
        key = _loaded(_content(path), password)
    except TypeError as error:
        if password:
            raise InputError(f"{path} has no password; sign without one") from error
        raise InputError(f"{path} is locked with a password, which is needed to sign with it") from error
    except ValueError as error:
        if password:
            raise InputError(f"the password does not open {path}; nothing was signed") from error
        raise InputError(f"{path} holds no private key in PEM, such as `compressor key` makes") from error
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey  # `_loaded` has said if it is not

    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise InputError(f"{path} is no key on a NIST curve ({', '.join(CURVES)}), such as `compressor key` makes")
    return key


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the key {path} can't be read: {error.strerror}; `compressor key` makes one") from error


def _loaded(content: bytes, password: bytes) -> object:
    """A private key of any kind; TypeError where a password is missing or too much, ValueError for no key."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise MissingPackageError(f"signing needs `cryptography`; {_REMEDY}") from error
    try:
        return load_pem_private_key(content, password=password or None)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
