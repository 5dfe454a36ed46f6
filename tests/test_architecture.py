"""What a room may know: import direction, one door per heavy library, no pickle, no work at import."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from compressor import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compressor"


def read_rooms() -> tuple[tuple[str, ...], ...]:
    """The rooms of ARCHITECTURE's table, lowest first: every name in the first column, a row a tuple."""
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("| room | what it holds |")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return tuple(tuple(re.findall(r"`(\w+)`", row)) for row in rows)


# a module imports from rooms before its own, or from its own package
ROOMS = read_rooms()

DOORS: dict[str, tuple[str, ...]] = {
    "torch_pruning": (),  # the peer of the benchmarks and the tests' oracle
    "zennit": ("relevance/",),
    "onnx": ("export/", "device/"),
    "onnxruntime": ("export/", "device/"),
    "onnxslim": ("export/",),
    "onnxscript": ("export/",),
    "tensorrt": ("export/", "device/"),
    "tensorrt_rtx": ("export/", "device/"),
    "openvino": ("export/", "device/"),
    "cv2": ("device/cameras.py",),
    "optuna": ("searching/",),
    "transformers": ("inputs/transformers_models.py",),
    "datasets": ("inputs/huggingface_datasets.py",),
    "typer": ("cli/",),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "cryptography": ("device/signature.py", "signing.py"),
    "model_signing": ("signing.py",),
    "cyclonedx": ("delivery/bom.py",),
}

TORCHLESS = ("device/", "report/", "errors.py", "records.py", "files.py", "__init__.py")
EDGE_BOX_LACKS = (
    *("torch", "torchvision", "timm", "zennit", "torch_pruning", "onnx", "onnxscript", "onnxslim", "optuna", "pandas"),
    *("typer", "rich", "click", "matplotlib", "jinja2", "safetensors", "PIL", "scipy", "sklearn"),
    *("cryptography", "model_signing", "cyclonedx"),
)


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]


MODULES = sources("compressor")
SHIPPED = sources("compressor", "models", "benchmarks")


def within(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(name: str) -> int:
    return next((i for i, room in enumerate(ROOMS) if name in room), -1)


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Full dotted names a file imports anywhere, also inside functions and by name; relative ones resolved."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def heads(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=within)
def test_imports_point_to_lower_rooms(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        pytest.skip("the public API names every room, lazily: see test_importing_the_package_is_light")
    own = within(path).split("/")[0].removesuffix(".py")
    assert room_of(own) >= 0, f"{own} has no room; give it a place in ROOMS"
    named = {name.split(".")[1] for name in imports(path) if name.startswith("compressor.")} - {own}
    unknown = {
        name for name in named if room_of(name) < 0 and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists())
    }
    upward = {name for name in named if room_of(name) >= room_of(own)}
    assert not unknown
    assert not upward, (
        f"{within(path)} imports {sorted(upward)}, which {'is' if len(upward) == 1 else 'are'} not below it"
    )


@pytest.mark.parametrize("path", MODULES, ids=within)
def test_nothing_in_the_package_imports_what_stands_around_it(path: Path) -> None:
    assert heads(path).isdisjoint({"benchmarks", "tests", "models"})


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    found = [within(p) for p in MODULES if library in heads(p)]
    assert [p for p in found if not p.startswith(DOORS[library])] == []


@pytest.mark.parametrize("folder", ["export", "device"])
def test_tensorrt_is_named_in_one_module_of_a_folder(folder: str) -> None:
    found = [within(p) for p in sources(f"compressor/{folder}") if any(h.startswith("tensorrt") for h in heads(p))]
    assert len(found) <= 1, found


def test_torch_stays_out_of_rooms_that_ship_or_only_carry() -> None:
    found = [within(p) for p in MODULES if "torch" in heads(p) and within(p).startswith(TORCHLESS)]
    assert found == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in MODULES}
    edges = {n: {t for name in imports(p) if (t := _module(name, names)) and t != n} for n, p in names.items()}
    public = {n for n, p in names.items() if p.name == "__init__.py"}  # a package gathers its modules' names
    circles = [
        sorted(c) for c in _circles({n: {t for t in e if t not in public} for n, e in edges.items() if n not in public})
    ]
    assert circles == []


def _module(name: str, names: dict[str, Path]) -> str:
    """`compressor.records.Cost` to `compressor.records`."""
    return name if name in names else (name.rpartition(".")[0] if name.rpartition(".")[0] in names else "")


def _circles(edges: dict[str, set[str]]) -> Iterator[set[str]]:
    """What is left after taking away, again and again, modules that import nothing that is left."""
    left = dict(edges)
    while free := [n for n, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    if left:
        yield set(left)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_is_pickled(path: Path) -> None:
    named = set(imports(path)) - {"pickle.UnpicklingError"}  # what torch.load refuses a hostile file with
    assert {n.split(".")[0] for n in named}.isdisjoint(
        {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    )
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path.name}:{node.lineno}"
        assert called(node) != "torch.save", f"{where}: weights are safetensors"
        assert called(node) != "torch.load" or given.get("weights_only") == "True", f"{where}: weights_only=True"
        assert given.get("allow_pickle", "False") == "False", f"{where}: allow_pickle"


@pytest.mark.parametrize("path", MODULES, ids=within)
def test_no_device_or_environment_is_asked_at_import(path: Path) -> None:
    asked = [ast.unparse(n) for n in _at_import(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
    assert [a for a in asked if a.startswith(("os.environ", "os.getenv", "os.cpu_count", "torch.cuda"))] == []


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but the bodies of functions and of the `if __name__ == "__main__"` block."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_importing_the_package_is_light() -> None:
    heavy = ["torch", "torchvision", "timm", "zennit", "onnx", "onnxruntime", "matplotlib", "typer", "pandas"]
    found = run_python(f"import sys, compressor; print([m for m in {heavy} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


HEAVY = ("torch", "torchvision", "timm", "zennit", "torch_pruning", "onnx", "onnxruntime", "sklearn", "scipy", "pandas")


def test_the_version_is_said_without_numpy() -> None:
    code = (
        "import sys; from compressor.__main__ import main; code = main(['--version']); "
        f"sys.exit(code or [m for m in {(*HEAVY, 'numpy', 'typer', 'rich')} if m in sys.modules] or 0)"
    )
    found = run_python(code)
    assert (found.returncode, found.stdout) == (0, f"compressor {__version__}\n"), found.stderr


def test_the_command_line_is_read_without_torch() -> None:
    heavy = (*HEAVY, "matplotlib", "optuna")
    found = run_python(
        "import sys, compressor.cli; from compressor.recipe import read_recipe; read_recipe(composite='yeom2021'); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert found.stdout.strip() == "[]", found.stderr


# ends the process at the first import of torch, which is announced to hooks before it begins
STOPPED_AT_TORCH = """
import os, sys

def stop(event, details):
    if event == "import" and details[0] == "torch":
        print("torch", file=sys.stderr, flush=True)
        os._exit(0)

sys.addaudithook(stop)
from compressor.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run_until_torch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STOPPED_AT_TORCH, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_first_line_says_what_is_compressed_before_torch_is_imported(tmp_path: Path) -> None:
    found = run_until_torch("compress", "--out", str(tmp_path / "run"))
    first, second = found.stderr.splitlines()
    assert first == (
        f"compress digits-resnet to macs 0.5: images digits:training and digits:evaluation, folder {tmp_path / 'run'}"
    )
    assert second == "torch"


@pytest.mark.parametrize(
    "words",
    [("--bugdet", "macs 0.5"), ("--budget", "half"), ("--criterion", "lpr"), ("--targets", "SM866"), ("--seed", "x")],
    ids=" ".join,
)
def test_what_was_asked_for_wrongly_is_refused_before_torch_is_imported(words: tuple[str, ...]) -> None:
    found = run_until_torch("compress", *words)
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1), found.stderr
    assert found.stderr.startswith("error: ")


def test_the_flow_is_imported_without_what_only_some_stages_need() -> None:
    late = (
        "torchvision",
        "timm",
        "zennit",
        "torch_pruning",
        "onnxruntime",
        "sklearn",
        "matplotlib",
        "optuna",
        "pandas",
    )
    found = run_python(f"import sys, compressor.pipeline; print([m for m in {late} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_the_public_names_exist() -> None:
    found = run_python("import compressor; [getattr(compressor, n) for n in getattr(compressor, '__all__', [])]")
    assert found.returncode == 0, found.stderr


def test_the_device_room_needs_numpy_alone() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources("compressor/device")]
    names = [n for n in names if not n.endswith("__main__")]
    hidden = f"import sys, importlib\nfor m in {EDGE_BOX_LACKS}: sys.modules[m] = None\n"
    found = run_python(f"{hidden}for n in {names}: importlib.import_module(n)")
    assert found.returncode == 0, found.stderr


def project_files() -> list[Path]:
    """Files git holds or would hold; without git, all but hidden folders and the usual leftovers."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        return [ROOT / name for name in listed if (ROOT / name).is_file()]
    parts = ("__pycache__", "runs", "build", "dist")
    inside = (p for p in ROOT.rglob("*") if p.is_file() and not p.name.endswith(".pyc"))
    return [p for p in inside if not any(x in parts or x.startswith(".venv") for x in p.relative_to(ROOT).parts)]


# Written in pieces, so that this file doesn't hold what it looks for.
FORBIDDEN = {
    "an absolute path of some machine": re.compile("/wo" + r"rk/|(?<![\w.~$}])/(?:ro" + "ot|ho" + r"me)/\w"),
    "a package index": re.compile(r"py" + r"pi\.org|pythonhosted\.org|download\.pytorch\.org|py" + r"pi\.nvidia\.com"),
    "an index option": re.compile(r"--(?:extra-)?index" + "-url|--find" + "-links|--trusted" + "-host"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names_a_machine_or_an_index(what: str) -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        hit = FORBIDDEN[what].search(text)
        if hit:
            found.append(f"{path.relative_to(ROOT)}: {hit.group()}")
    assert found == []


def test_every_module_and_package_has_one_room_and_every_room_is_there() -> None:
    there = {within(path).split("/")[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    named = [name for room in ROOMS for name in room]

    assert sorted(named) == sorted(there)


def test_the_rooms_name_no_module_twice() -> None:
    names = [name for room in ROOMS for name in room]
    assert len(names) == len(set(names))
