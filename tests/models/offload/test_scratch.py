"""What a model is read from lives as long as the model, and no longer."""

import gc
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cadenza.models.errors import ModelError
from cadenza.models.offload.scratch import Scratch

KILLED = """
import os, signal, sys
from pathlib import Path
from cadenza.models.offload.scratch import Scratch
(Scratch(Path(sys.argv[1])).path / "tensor.dat").write_bytes(b"1234")
os.kill(os.getpid(), signal.SIGKILL)
"""
ENDED = """
import sys
from pathlib import Path
from cadenza.models.offload.scratch import Scratch
class Owner: pass
owner, scratch = Owner(), Scratch(Path(sys.argv[1]))
scratch.keep_for(owner)
print(scratch.path.exists())
"""


class Owner:
    pass


def test_it_goes_with_its_owner(cache: Path) -> None:
    owner, scratch = Owner(), Scratch(None)
    scratch.keep_for(owner)
    (scratch.path / "tensor.dat").write_bytes(b"1234")
    assert scratch.path.parent == cache / "offload"
    Scratch(None)
    assert scratch.path.exists(), "another one must not take away what is in use"
    del owner
    gc.collect()
    assert not scratch.path.exists()


def test_it_goes_with_its_process(tmp_path: Path, cache: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", ENDED, tmp_path], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "True"
    assert list(tmp_path.glob("cadenza-offload-*")) == []


def test_what_a_killed_process_left_goes_with_the_next_start(tmp_path: Path, cache: Path) -> None:
    finished = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert finished.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("cadenza-offload-*")
    scratch = Scratch(tmp_path)
    assert not left.exists()
    assert list(tmp_path.glob("cadenza-offload-*")) == [scratch.path]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"the offload folder .*file/below cannot be written"):
        Scratch(tmp_path / "file" / "below")
