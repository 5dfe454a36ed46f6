"""The device side on aarch64, emulated: Debian's arm64 in a folder, reached as a device over SSH.

    sudo python benchmarks/aarch64.py                            # the bundle of runs/digits-resnet
    sudo python benchmarks/aarch64.py --bundle RUN --root FOLDER  # FOLDER is made once, and used again

It makes the system (Debian: apt-get install debootstrap qemu-user-static openssh-server), installs this package's wheel
with numpy and ONNX Runtime from their aarch64 wheels, ships the bundle there, and has the evaluation scans answered
there. Emulated times say nothing of a real device's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from ship_demo import require, servers, ship

from compressor.device.bundle import read_bundle
from compressor.device.images import Preprocessing
from compressor.inputs.sources import load_images

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "aarch64"
PYTHON = "/edge/bin/python"
WITH = ("numpy", "onnxruntime", "pillow")
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
REMEDY = "run it as root, with: apt-get install debootstrap qemu-user-static openssh-server"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("runs/digits-resnet"), help="a run's folder")
    parser.add_argument("--root", type=Path, default=Path("/var/tmp/compressor-arm64"), help="the emulated system")
    options = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap") or not shutil.which("qemu-aarch64-static"):
        sys.exit(REMEDY)
    system = prepared(options.root.resolve())
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder), system, options.bundle)))


def prepared(system: Path) -> Path:
    """The emulated system's folder, with the environment of a device in it."""
    if not (system / "bin" / "sh").exists():
        include = "--include=python3,python3-venv,rsync"
        subprocess.run(
            ["debootstrap", "--arch=arm64", "--variant=minbase", include, "bookworm", str(system)], check=True
        )
    wheels = system / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(REPOSITORY)], check=True)
    platforms = [word for tag in TAGS for word in ("--platform", tag)]
    chosen = ["--only-binary=:all:", "--python-version", _within(system, "/usr/bin/python3", "-c", _VERSION)]
    subprocess.run([*pip, "download", "--quiet", *platforms, *chosen, "-d", str(wheels), *WITH], check=True)
    _within(system, "/usr/bin/python3", "-m", "venv", "--clear", "/edge")
    names = [f"/wheels/{wheel.name}" for wheel in sorted(wheels.iterdir())]
    _within(system, PYTHON, "-m", "pip", "install", "--quiet", "--no-index", *names)
    return system


def measured(folder: Path, system: Path, run: Path) -> dict[str, Any]:
    """Ships there, then has the evaluation scans answered there, beside what the manifest states."""
    machine = _within(system, PYTHON, "-c", "import platform; print(platform.machine())")
    require(machine == "aarch64", f"the device's Python runs on {machine}")
    with servers(folder, [PYTHON], names=[NAME], within=system):
        shipped = ship(folder, run, "--seconds", "1")
    require(shipped.code == 0, "shipped: verified, its answers compared, timed, switched")

    bundle = system / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(run / "bundle", bundle)
    write_scans(system / "scans", read_bundle(bundle).preprocessing)
    stated = _within(system, "/edge/bin/compressor", "run", "/bundle", "/scans", "--top", "1", "--json")
    answered = json.loads(stated.splitlines()[-1])
    return {"machine": machine, **shipped.rows[NAME], "quality": answered["quality"], "stated": answered["stated"]}


def write_scans(folder: Path, how: Preprocessing) -> None:
    """The embedded model's evaluation scans as a folder of PNG and labels, of the size that the model takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    scans = load_images("digits:evaluation").prepared(how)
    rows = ["image,label"]
    for index, label in enumerate(scans.labels):
        pixels = scans.pixels(index).numpy()  # uint8 [C, H, W]
        Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(folder / f"{index:04}.png")
        rows.append(f"{index:04}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


_VERSION = "import sys; print('.'.join(map(str, sys.version_info[:2])))"


def _within(system: Path, *command: str) -> str:
    """What a command of the emulated system prints. PIP's settings of the host stay outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(["chroot", str(system), *command], capture_output=True, text=True, env=kept, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode} there: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
