"""The default model within half of its weights, in a process that the system would not give more.

RLIMIT_DATA counts a process's private writable memory, not the files that it maps. What the process has before it
loads anything is allowed on top, and as much again as its own parts (threads' stacks, the tokenizer, code) take.
"""

import re
import subprocess
import sys

import pytest

from cadenza.decoding import Engine

HALF = 269_000_000
OWN_PARTS = 128 * 2**20
PROMPTS = ["The quick brown fox", "Once upon a time,", "2, 4, 6,"]
PROGRAM = f"""
import resource, sys
import torch, transformers, accelerate
from transformers import LlamaForCausalLM
from cadenza.decoding import Engine, EngineConfig
from cadenza.models import LoadConfig, ModelError
import cadenza.models.module
status = open("/proc/self/status").read()
own = int(status.partition("VmData:")[2].split()[0]) * 1024
limit = own + {HALF} + {OWN_PARTS}
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
max_memory = sys.argv[1] if len(sys.argv) > 1 else None
config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, enable_prefix_caching=False)
def load():
    return Engine.load("smollm2", LoadConfig(device="cpu", dtype="float32", max_memory=max_memory), config)
if max_memory is None:
    try:
        load()
    except ModelError as refusal:
        print("refused:", refusal, flush=True)
    cadenza.models.module.require_memory = lambda *arguments: None
with load() as engine:
    for completion in engine.generate_batch({PROMPTS!r}, temperature=0, max_tokens=8, ignore_eos=True):
        print(repr(completion.text))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_half_of_the_memory_gives_the_same_text(live_engine: Engine) -> None:
    expected = live_engine.generate_batch(PROMPTS, temperature=0, max_tokens=8, ignore_eos=True)
    finished = run(str(HALF))
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines() == [repr(completion.text) for completion in expected]


def test_without_a_budget_the_same_process_cannot_load_it() -> None:
    """It is refused with the numbers; and when nobody asks beforehand, memory does run out."""
    finished = run()
    assert finished.returncode != 0
    refusal, *rest = finished.stdout.splitlines()
    assert re.match(r"refused: smollm2 does not fit: .*--max-memory", refusal)
    assert rest == []
    assert re.search(r"can't allocate memory|Cannot allocate memory|MemoryError|bad_alloc", finished.stderr)
