"""What is installed: is nothing forgotten in it, does it run on what it says it needs, and is that all it loads?

The wheel is made by way of the source archive, as `python -m build` does, and goes into an environment of its own that
holds links to the declared dependencies, theirs included, and nothing else: a package that is missing in the
declaration is missing there. No network is used.
"""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import mido
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TREE = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
FRAME = ("pyproject.toml", "README.md", "realtime_mpe", "training", "models", "tests", "examples")
PLACES = {"realtime_mpe": "realtime_mpe", "training": "realtime_mpe/training", "models": "realtime_mpe/models"}
RUNTIME, TRAINING, DEVELOPMENT = "the runtime", "[train]", "[dev]"
NOT_IN_THE_RUNTIME = ("torch", "scipy", "onnx", "nnAudio", "mir_eval", "fluidsynth", "realtime_mpe.training")


class Ended(NamedTuple):
    code: int
    out: str
    err: list[str]


def ended(command, cwd, seconds=30):
    """Run a command in `cwd`, shielded from how this very test found its packages."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": seconds}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, **options)
    return Ended(done.returncode, done.stdout, done.stderr.splitlines())


def source_files(folder):
    """Every file below a folder of the tree that is neither hidden nor made by running it."""
    for path in sorted((TREE / folder).rglob("*")):
        parts = path.relative_to(TREE).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield path


def build(kind, tree, out):
    """Make the archive `kind`, "sdist" or "wheel", of a tree that may be written to; its path."""
    hook = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    out.mkdir()
    done = ended([sys.executable, "-c", hook, out], tree)
    assert done.code == 0, done.err[-20:]
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, made from a copy, for building leaves folders behind."""
    place = tmp_path_factory.mktemp("build")
    rubbish = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for name in PLACES:
        shutil.copytree(TREE / name, place / "tree" / name, ignore=rubbish)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, place / "tree")
    with tarfile.open(build("sdist", place / "tree", place / "sdist")) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    return build("wheel", unpacked, place / "wheel")


def closure(requirements):
    """Names of the distributions that these lines ask for, and of those that they need themselves."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(line) for line in importlib.metadata.distribution(name).requires or ()]
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder with the programs of an environment that holds the wheel and its dependencies, and no more."""
    if os.name == "nt":
        pytest.skip("links need special rights on Windows")
    place = tmp_path_factory.mktemp("installed")
    assert ended([sys.executable, "-m", "venv", "--without-pip", place], place).code == 0
    done = ended([sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet",
                  "--no-deps", "--no-index", "--disable-pip-version-check", wheel], place)  # fmt: skip
    assert done.code == 0, done.err
    (packages,) = place.glob("lib/python*/site-packages")
    for name in closure(PROJECT["dependencies"]):
        distribution = importlib.metadata.distribution(name)
        tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
        assert tops, f"{name} does not tell what files it has"
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return place / "bin"


# What is there


@pytest.mark.parametrize("name", FRAME)
def test_the_frame_is_complete(name):
    assert (TREE / name).exists()
    assert not (TREE / name).is_dir() or any(source_files(name))


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {
        f"{place}/{path.relative_to(TREE / folder).as_posix()}"
        for folder, place in PLACES.items()
        for path in source_files(folder)
    }
    assert {"realtime_mpe/demo.ogg", "realtime_mpe/models/default.onnx", "realtime_mpe/training/train.py"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        about = {name for name in names if ".dist-info/" in name}
        assert names - about == expected
        assert {name.partition(".dist-info/")[2] for name in about} == {
            "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"
        }  # fmt: skip
        for folder, place in PLACES.items():
            for path in source_files(folder):
                packed = archive.read(f"{place}/{path.relative_to(TREE / folder).as_posix()}")
                assert packed == path.read_bytes(), path


# What it needs


def imports(path):
    """Full names of what a file imports anywhere in it; what is next to it counts as part of realtime_mpe."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [*["realtime_mpe"][: node.level], *filter(None, [node.module])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("realtime_mpe", ()),
        ("models", ()),
        ("examples", ()),
        ("training", ("train", "cluster")),
        ("tests", ("train", "cluster", "dev")),
    ],
)
def test_every_import_is_declared(folder, extras):
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines} | {canonicalize_name(PROJECT["name"])}
    distributions = importlib.metadata.packages_distributions()
    for path in source_files(folder):
        for name in imports(path) if path.suffix == ".py" else ():
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top == "realtime_mpe":
                continue
            if folder == "tests" and top not in distributions:
                continue  # a module that the test itself has written
            sold_as = {canonicalize_name(distribution) for distribution in distributions.get(top, ())}
            assert sold_as & declared, f"{path.name} imports {name}, which no dependency of {folder} provides"


def test_the_runtime_never_imports_what_is_for_training():
    for path in source_files("realtime_mpe"):
        for name in imports(path) if path.suffix == ".py" else ():
            for forbidden in NOT_IN_THE_RUNTIME:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path.name} imports {name}"


def test_nothing_that_the_runtime_loads_asks_for_what_is_for_training():
    code = """
        import importlib, json, pkgutil, sys

        class Watch:
            asked = []
            def find_spec(self, name, path=None, target=None):
                if any(f"{name}.".startswith(f"{other}.") for other in FORBIDDEN):
                    self.asked.append(name)
                    raise ModuleNotFoundError(name, name=name)

        sys.meta_path.insert(0, Watch())
        import realtime_mpe
        modules, folders = [], [(realtime_mpe.__path__, "realtime_mpe.")]
        while folders:
            for module in pkgutil.iter_modules(*folders.pop()):
                if module.name in ("realtime_mpe.training", "realtime_mpe.models"):
                    continue
                loaded = importlib.import_module(module.name)
                modules.append(module.name)
                if module.ispkg:
                    folders.append((loaded.__path__, module.name + "."))
        import mido, rtmidi, sounddevice  # which the modules load late
        print(json.dumps([modules, Watch.asked]))
    """
    lines = "\n".join(line[8:] for line in code.splitlines()).replace("FORBIDDEN", repr(NOT_IN_THE_RUNTIME))
    done = ended([sys.executable, "-c", lines], TREE)
    assert done.code == 0, done.err
    modules, asked = json.loads(done.out)
    there = {path.stem for path in (TREE / "realtime_mpe").rglob("*.py")} - {"__init__"}
    assert there <= {name.rpartition(".")[2] for name in modules}
    assert asked == []


# Whether it runs


def test_the_installed_program_listens_and_records_without_training_packages(installed, tmp_path):
    words = ["listen", "--source", "demo", "--duration", "3", "--record", "take.mid"]
    done = ended([installed / "rt-mpe", *words], tmp_path)
    assert done.code == 0, done.err
    assert done.err and not [line for line in done.err if not line.startswith("rt-mpe: ") or "error" in line]
    assert mido.MidiFile(tmp_path / "take.mid").type == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_the_installed_program_says_how_to_get_the_training_packages(installed, tmp_path, command):
    done = ended([installed / "rt-mpe", command], tmp_path)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err
    assert 'pip install "realtime-mpe[train]"' in line


def test_the_installed_program_knows_its_version_and_its_model(installed, tmp_path):
    done = ended([installed / "rt-mpe", "--version"], tmp_path)
    assert done == (0, f"rt-mpe {PROJECT['version']}\n", [])
    assert ended([installed / "rt-mpe", "info"], tmp_path).code == 0


def test_the_environment_is_as_empty_as_these_tests_say(installed, tmp_path):
    code = """if True:
        import importlib.util, realtime_mpe.cli, sys
        assert not {"torch", "numpy", "realtime_mpe.training"} & set(sys.modules)
        assert realtime_mpe.cli.__file__.startswith(sys.prefix), realtime_mpe.cli.__file__
        there = [name for name in ("torch", "scipy", "onnx", "pytest", "pip") if importlib.util.find_spec(name)]
        assert not there, there
    """
    done = ended([installed / "python", "-c", code], tmp_path)
    assert done.code == 0, done.err
