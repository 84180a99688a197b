"""What is shipped: the distributions and their contents, the documents' promises."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sparse_conv

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")

CHECK_IMPORTS = """
import sys
import sparse_conv
present = {"cupy", "numba"} & set(sys.modules)
sys.exit(f"imported: {', '.join(sorted(present))}" if present else 0)
"""


def run_python(
    *arguments: str, path: Path = ROOT, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs Python with `path` before everything that is installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def build(target: str, source: Path, folder: Path) -> Path:
    """Builds a distribution of `source` with what is installed; downloads nothing."""
    result = run_python(
        "-m", "hatchling", "build", "-t", target, "-d", str(folder), cwd=source
    )
    assert result.returncode == 0, result.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        for member in archive.getmembers():
            assert member.isfile()
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
    return folder / f"sparse_conv-{sparse_conv.__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    return unpacked(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


def unpacked(wheel: Path) -> Path:
    folder = wheel.with_name("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_import_brings_in_no_back_end():
    result = run_python("-c", CHECK_IMPORTS)
    assert result.returncode == 0, result.stderr


def test_the_check_of_imports_can_fail():
    result = run_python("-c", "import numba\n" + CHECK_IMPORTS)
    assert result.returncode == 1
    assert "imported: numba" in result.stderr


def test_wheel_holds_the_package_and_nothing_beside_it(wheel):
    top = {path.name for path in wheel.iterdir()}
    assert top == {"sparse_conv", f"sparse_conv-{sparse_conv.__version__}.dist-info"}
    shipped = files(wheel / "sparse_conv")
    assert {"py.typed", "data/chelsea.jpg", "data/README.md"} <= shipped
    assert {"costs/cpu-avx2.json", "costs/cuda-sm90.json"} <= shipped
    kernels = {f"kernels/{name}" for name in files(ROOT / "kernels")}
    assert any(name.endswith(".cu") for name in kernels)
    assert kernels <= shipped
    sources = files(ROOT / "sparse_conv")
    modules = {name for name in sources if name.endswith((".py", ".ll"))}
    assert modules <= shipped
    assert all(
        name.endswith((".py", ".ll", ".cu", ".cuh", ".md", ".jpg", ".json"))
        or name == "py.typed"
        for name in shipped
    )


def test_wheel_finds_its_own_kernels_and_photograph(wheel, tmp_path):
    program = (
        "import sparse_conv\n"
        "from sparse_conv._cli.photograph import BUNDLED, read\n"
        "from sparse_conv.jit import KERNELS\n"
        "print(sparse_conv.__file__, BUNDLED, KERNELS, sep='\\n')\n"
        "print(read(BUNDLED).shape)"
    )
    result = run_python("-c", program, path=wheel, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        str(wheel / "sparse_conv" / "__init__.py"),
        str(wheel / "sparse_conv" / "data" / "chelsea.jpg"),
        str(wheel / "sparse_conv" / "kernels"),
        "(256, 512, 3)",
    ]


def test_sdist_holds_the_tests_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    assert {".ci/run", "LICENSE", "tests/test_package.py"} <= files(sdist)
    assert files(unpacked(build("wheel", sdist, tmp_path))) == files(wheel)


def test_version_agrees(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    version = re.search(r"^Version: (.+)$", metadata.read_text("utf-8"), re.MULTILINE)
    assert version[1] == sparse_conv.__version__
    assert re.search(r"^## (\S+)", CHANGELOG, re.MULTILINE)[1] == version[1]


def test_metadata_allows_this_python(wheel):
    (found,) = importlib.metadata.distributions(path=[str(wheel)])
    assert found.metadata["Requires-Python"] == "<3.14,>=3.10"
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert {"cuda12", "cuda13", "test", "bench"} == set(
        found.metadata.get_all("Provides-Extra")
    )


def test_readme_commands_are_those_of_ci():
    demo, tests, *_ = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert demo.split(" && ") == [
        "python3 -m venv .venv",
        ".venv/bin/pip install -q .",
        ".venv/bin/python -m sparse_conv demo\n",
    ]
    create, install, pytest_command = tests.strip().split(" && ")
    assert create == "python3 -m venv .venv"
    ci = CI.splitlines()
    assert install.removeprefix(".venv/bin/") in ci
    assert ci[-1] == pytest_command.removeprefix(".venv/bin/")
    assert any(line.startswith("python -m sparse_conv demo") for line in ci)


def test_every_public_name_has_a_docstring():
    public = [getattr(sparse_conv, name) for name in sparse_conv.__all__]
    documented = [
        value for value in public if inspect.isclass(value) or callable(value)
    ]
    assert len(documented) == len(public) - 1, "all but the version"
    for value in documented:
        assert inspect.getdoc(value)
        if inspect.isclass(value):
            for name, member in vars(value).items():
                if not name.startswith("_"):
                    assert inspect.getdoc(member), f"{value.__name__}.{name}"


def test_info_runs_as_a_module(tmp_path):
    result = run_python("-m", "sparse_conv", "info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("versions", "tensorflow", "devices", "back ends", "cpu", "caches"):
        assert word in result.stdout
