"""The four folders install as parts of one namespace, and shadow nobody else's packages."""

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]


def test_our_kernels_folder_is_not_taken_for_the_kernels_package() -> None:
    """transformers imports Hugging Face's `kernels` if it finds one, and the repository's root has a folder of that
    name: with an `__init__.py` in it, this import would fail."""
    command = [sys.executable, "-c", "from transformers import LlamaForCausalLM"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_installed_distribution_holds_only_the_namespace() -> None:
    installed = [PurePosixPath(str(path)) for path in files("cadenza") or ()]
    modules = [path for path in installed if path.suffix == ".py" and path.parts[0] != ".."]
    if all(path.name.startswith("__editable__") for path in modules):
        pytest.skip("an editable install has no modules of its own; `make wheel-test` runs this on a wheel")
    assert {path.parts[0] for path in modules} == {"cadenza"}
    assert PurePosixPath("cadenza/__init__.py") not in modules


def test_every_package_is_listed() -> None:
    """Packages are named one by one in pyproject.toml; a folder that is forgotten would be missing from the wheel."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("cadenza", *path.parent.relative_to(ROOT).parts))
        for top in ("server", "decoding", "models", "kernels")
        for path in (ROOT / top).rglob("*.py")
    }
    assert listed == found
