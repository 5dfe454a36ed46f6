"""A bundle as one file: the same bytes every time, and nothing comes out of one that the writer did not put there."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.device import archive as archives
from compressor.device.archive import pack_bundle, unpack_bundle
from compressor.device.bundle import read_bundle, verify_bundle
from compressor.errors import CompressorError, FolderError, GateError, InputError

from .conftest import Command
from .signing import sign, write_keys
from .tampering import put
from .test_attacks import MODEL, QUICK, assert_refused, plant, with_recipe
from .test_fuzzing import assert_held, mutated

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def archive(bundle: Path) -> Path:
    return pack_bundle(bundle)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_makes_the_same_bytes_wherever_and_whenever(bundle: Path, archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "another name"
    copy.mkdir(parents=True)
    for name, data in reversed(contents(bundle).items()):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
        os.utime(copy / name, (1, 1))
        (copy / name).chmod(0o600)
    assert pack_bundle(copy, tmp_path / "copy.tar").read_bytes() == archive.read_bytes()


def test_any_tar_reads_it(bundle: Path, archive: Path) -> None:
    with tarfile.open(archive, "r:") as opened:
        members = opened.getmembers()
        assert {member.name: opened.extractfile(member).read() for member in members} == contents(bundle)  # type: ignore[union-attr]
    assert [(m.mode, m.uid, m.gid, m.mtime, m.uname) for m in members] == [(0o644, 0, 0, 0, "")] * len(members)


def test_the_header_is_that_of_the_standard() -> None:
    for name, size_bytes in (("a", 0), ("d" * 60 + "/" + "f" * 60, 77), ("ä/ö", (1 << 33) - 1), ("x" * 100, 1)):
        header = archives._header(name, size_bytes)
        parsed = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        assert (parsed.name, parsed.size, parsed.isreg()) == (name, size_bytes, True)
        reference = tarfile.TarInfo(name)
        reference.size = size_bytes
        by_library = reference.tobuf(tarfile.USTAR_FORMAT, "utf-8")
        devices, checksum = slice(329, 345), slice(148, 156)  # which Python versions fill with zeros or leave empty
        expected, actual = bytearray(by_library), bytearray(header)
        for part in (devices, checksum):
            expected[part] = actual[part] = bytes(len(range(*part.indices(512))))
        assert actual == expected


@pytest.mark.parametrize("name", ["x" * 101, "d" * 156 + "/f", "d/" + "f" * 101])
def test_a_name_that_no_archive_holds_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="too long a name"):
        archives._header(name, 1)
    with pytest.raises(InputError, match="longer than"):
        archives._header("x", 1 << 33)


def test_there_and_back(bundle: Path, archive: Path, tmp_path: Path) -> None:
    folder = unpack_bundle(archive, tmp_path / "back")
    assert contents(folder) == contents(bundle)
    assert verify_bundle(folder).passed


def test_a_signature_travels_and_engines_of_this_device_stay(bundle: Path, tmp_path: Path, command: Command) -> None:
    private, public = write_keys(tmp_path, "key")
    sign(bundle, private)
    plant(bundle)
    archive = pack_bundle(bundle)
    shutil.rmtree(bundle)
    answer = command("verify", archive, "--key", public)
    assert (answer.code, "built/" in answer.out) == (0, False)
    assert answer.out.splitlines()[-1].startswith("signed by")


@pytest.mark.parametrize("verb", ["verify", "run", "benchmark"])
def test_every_verb_takes_an_archive_and_leaves_nothing(
    bundle: Path,
    archive: Path,
    image: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: str,
) -> None:
    shutil.rmtree(bundle)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    words = {"verify": (), "run": (image,), "benchmark": (*QUICK, "--runtime", "onnxruntime")}[verb]
    answer = command(verb, archive, *words)
    assert answer.code == 0
    assert answer.err == "" or (verb == "run" and answer.err.startswith("runs models/"))  # what answers, and why
    assert list(scratch.iterdir()) == []
    assert not bundle.exists()


def test_what_is_built_of_an_archive_stays_beside_it(bundle: Path, command: Command) -> None:
    archive = pack_bundle(with_recipe(bundle, ("none",)))
    assert_refused(command("build", archive), "no library for engines")
    assert_refused(command("build", archive), "no library for engines")  # the folder is there by now, and the same
    shutil.rmtree(bundle)
    command("build", archive)
    assert read_bundle(bundle).build


def test_the_verbs_pack_and_unpack(bundle: Path, tmp_path: Path, command: Command) -> None:
    packed = command("pack", bundle, "--json")
    assert f'"archive": "{bundle}.tar", "sha256"' in packed.out
    assert command("unpack", f"{bundle}.tar", "--out", tmp_path / "b").out.strip() == str(tmp_path / "b")
    assert command("pack", tmp_path / "b", "--out", tmp_path / "c.tar").code == 0
    assert (tmp_path / "c.tar").read_bytes() == Path(f"{bundle}.tar").read_bytes()
    assert_refused(command("pack", bundle, "--out", tmp_path), "is a folder")


def test_the_folder_that_one_is_in_is_packed_beside_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    assert pack_bundle(".") == Path(f"{bundle}.tar")
    monkeypatch.chdir(bundle.parent)
    assert pack_bundle(bundle.name) == Path(f"{bundle.name}.tar")


def test_a_damaged_bundle_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    (bundle / MODEL).write_bytes(b"x")
    with pytest.raises(GateError, match="is truncated"):
        pack_bundle(bundle)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bundle"]


def test_a_folder_of_something_else_is_left_alone(bundle: Path, archive: Path, tmp_path: Path) -> None:
    plant(bundle)
    assert unpack_bundle(archive) == bundle  # the same bundle, with what was built in it
    assert (bundle / "built").is_dir()
    (bundle / MODEL).write_bytes(b"x")
    with pytest.raises(GateError, match="is truncated"):
        unpack_bundle(archive)
    put(bundle, "labels|0", "wolf")
    for folder in (bundle, tmp_path / "notes", tmp_path / "file"):
        if folder.name == "notes":
            folder.mkdir()
        elif folder.name == "file":
            folder.write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(FolderError, match="name another folder"):
            unpack_bundle(archive, folder)
        assert contents(tmp_path) == before


# --- archives from elsewhere -----------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, data


def written(members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as opened:
        for entry, data in members:
            opened.addfile(entry, io.BytesIO(data) if entry.isreg() else None)
    return file.getvalue()


def ours(*files: tuple[str, bytes]) -> bytes:
    """As the writer has it, whatever the names are."""
    file = io.BytesIO()
    for name, data in files:
        file.write(archives._header(name, len(data)) + data + bytes(-len(data) % 512))
    return file.getvalue() + bytes(1024)


OUTSIDE = "../escaped"
FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a symbolic link": (
        lambda _: written([member("a", b"", type=tarfile.SYMTYPE, linkname="/etc")]),
        "a symbolic link",
    ),
    "a hard link": (lambda _: written([member("a", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")]), "a hard link"),
    "a device": (lambda _: written([member("a", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=8)]), "a device"),
    "a disk": (lambda _: written([member("a", b"", type=tarfile.BLKTYPE, devmajor=8)]), "a device"),
    "a pipe": (lambda _: written([member("a", b"", type=tarfile.FIFOTYPE)]), "a pipe"),
    "a folder": (lambda _: written([member("a", b"", type=tarfile.DIRTYPE)]), "a folder"),
    "a sparse file": (lambda _: written([member("a", b"", type=tarfile.GNUTYPE_SPARSE)]), "a sparse file"),
    "an extended header": (
        lambda _: written([member("ü" * 100)], tarfile.PAX_FORMAT),
        "an extended header",
    ),
    "a long name": (lambda _: written([member("x" * 200)], tarfile.GNU_FORMAT), "a long name"),
    "an owner": (lambda _: written([member("a", uid=1000, gid=1000)]), "no file as the writer"),
    "rights": (lambda _: written([member("a", mode=0o4755)]), "no file as the writer"),
    "a time": (lambda _: written([member("a", mtime=1)]), "no file as the writer"),
    "a path upwards": (lambda _: ours((OUTSIDE, b"x")), "lies outside"),
    "a path upwards from below": (lambda _: ours(("a/../../escaped", b"x")), "lies outside"),
    "an absolute path": (lambda _: ours(("/tmp/escaped", b"x")), "lies outside"),
    "a path of Windows": (lambda _: ours(("..\\escaped", b"x")), "lies outside"),
    "a second name": (lambda _: ours(("./a", b"x")), "no path"),
    "no name": (lambda _: ours(("", b"x")), ""),
    "a name twice": (lambda _: ours(("a", b"x"), ("a", b"y")), "twice"),
    "names out of order": (lambda _: ours(("b", b"x"), ("a", b"y")), "out of order"),
    "a file as a folder": (lambda _: ours(("a", b"x"), ("a/b", b"y")), "a file in the place of a folder"),
    "no manifest": (lambda _: ours(("a", b"x")), "is no bundle"),
    "nothing": (lambda _: b"", "is cut off"),
    "an end alone": (lambda _: bytes(1024), "is no bundle"),
    "text": (lambda _: b"bundle" * 200, "no tar archive"),
    "gzip": (lambda whole: gzip.compress(whole), "is compressed (gzip)"),
    "a bomb": (lambda _: gzip.compress(bytes(1 << 24)), "is compressed (gzip)"),
    "bzip2": (lambda _: b"BZh91AY&SY" + bytes(600), "is compressed (bzip2)"),
    "xz": (lambda _: b"\xfd7zXZ\x00" + bytes(600), "is compressed (xz)"),
    "zstd": (lambda _: b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed (zstd)"),
    "zip": (lambda _: b"PK\x03\x04" + bytes(600), "is compressed (zip)"),
    "more behind its end": (lambda whole: whole + b"x", "behind its end"),
    "no end": (lambda whole: whole[:-1024], "is cut off"),
    "half an end": (lambda whole: whole[:-512], "behind its end"),
    "cut in a file": (lambda whole: whole[: len(whole) // 2], "is cut off"),
    "cut in a header": (lambda whole: whole[:100], "is cut off"),
    "a size that is not there": (lambda _: archives._header("a", 1 << 32) + b"x", "is cut off in 'a'"),
    "a file more": (lambda whole: ours(("a", b"x"))[:-1024] + whole, "is not in the bundle's manifest"),
    "an engine": (lambda whole: ours(("built/x.plan", b"x"))[:-1024] + whole, "no path"),
    "a damaged file": (lambda whole: whole.replace(b"conv.weight", b"conv.weighs", 1), "was changed"),
    "padding with something": (lambda whole: whole[:-1025] + b"x" + bytes(1024), "damaged behind"),
    "10,000 files": (lambda _: ours(*((f"{index:05}", b"") for index in range(10_000))), "more than 1000 files"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_archive_of_something_else_leaves_nothing_behind(
    archive: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, words = FAULTS[name]
    scratch, given = tmp_path / "scratch", tmp_path / "given"
    scratch.mkdir()
    given.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = given / "b.tar"
    path.write_bytes(change(archive.read_bytes()))
    for verb in ("unpack", "verify"):
        assert_refused(command(verb, path), words)
        assert list(scratch.iterdir()) == []
        assert [place.name for place in given.iterdir()] == ["b.tar"]
    assert not (tmp_path / "escaped").exists()
    assert not (given / "escaped").exists()


def test_a_file_that_is_called_otherwise_is_no_archive(archive: Path, tmp_path: Path, command: Command) -> None:
    archive.rename(tmp_path / "bundle.zip")
    assert_refused(command("verify", tmp_path / "bundle.zip"), "an archive called *.tar")


def test_a_linked_manifest_in_an_archive_is_none(archive: Path, command: Command) -> None:
    link = member("manifest.json", b"", type=tarfile.SYMTYPE, linkname="../manifest.json")
    archive.write_bytes(written([link]))
    assert_refused(command("verify", archive), "a symbolic link")


def test_a_full_disk_is_said_before_anything_is_written(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    with pytest.raises(FolderError, match=r"takes \d+ bytes and .* has 1048576"):
        unpack_bundle(archive, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_disk_that_fills_leaves_nothing(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: Any, target: Path, *more: Any) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "_extract_one", fill)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FolderError, match="No space left"):
        unpack_bundle(archive, tmp_path / "back")
    assert sorted(tmp_path.iterdir()) == before


def test_archives_of_damaged_bytes(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    path, folder = tmp_path / "damaged.tar", tmp_path / "damaged"

    def change(draw: random.Random) -> None:
        path.write_bytes(mutated(whole, draw))

    def read() -> None:
        try:
            unpack_bundle(path, folder)
        except CompressorError:
            assert not folder.exists()
            raise
        shutil.rmtree(folder)

    assert_held(change, read)


def test_a_bundle_of_ten_thousand_files_more_is_a_few_lines(bundle: Path, command: Command) -> None:
    (bundle / "many").mkdir()
    for index in range(10_000):
        (bundle / "many" / str(index)).touch()
    answer = command("verify", bundle)
    assert_refused(answer, "many/0 is not in the manifest")
    assert "9980 more files" in answer.out
    assert len(answer.out.splitlines()) < 30


def test_an_archive_replaces_nothing_but_an_archive(bundle: Path, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.tar").write_bytes(b"mine")
    for target, said in (
        (tmp_path / "image.png", "let it end with .tar"),
        (bundle / "inner.tar", "would change"),
        (tmp_path / "notes.tar", "no archive of a bundle"),
    ):
        before = contents(tmp_path)
        with pytest.raises(CompressorError, match=said):
            pack_bundle(bundle, target)
        assert contents(tmp_path) == before
    assert pack_bundle(bundle, archive).read_bytes() == before[archive.name]


def test_what_is_wrong_within_is_said_of_the_archive(archive: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    answer = command("verify", tmp_path / "empty.tar")
    assert_refused(answer, "empty.tar holds no whole bundle")
    assert tempfile.gettempdir() + os.sep + "compressor-" not in answer.err
    assert_refused(command("verify", archive.rename(tmp_path / "..tar")), "a name that no folder can have")
