"""How much memory a start takes: a random Llama of 1.1 billion parameters, loaded and asked, at each precision.

    python benchmarks/memory.py [--folder PATH] [--precisions int8 int4-32 …] [--json]

Every measurement is a process of its own: it imports all that the engine needs, forgets its peak so far, loads the
model, generates a few tokens, and tells the peak of its resident memory over what it had before loading. First with an
empty cache of quantized weights, then again. --folder: where the model is, or is made and kept (2.2 GB).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

PRECISIONS = ("float32", "bfloat16", "int8", "int4-32", "int4-64", "int4-128", "nf4", "fp8", "llm-int8")
LIMITS = {"int8": 0.30, "int4-32": 0.20}
"""Shares of the weights' bytes in float32 that a start may take, beside `ALLOWANCE`."""
ALLOWANCE = 300e6
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make_model(folder: Path) -> None:
    """In bfloat16, in shards of 1 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16"))
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="1GB")


def add_tokenizer(folder: Path) -> None:
    """A token for every byte, and an end."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    end = "<|end|>"
    vocabulary = {token: at for at, token in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def resident(field: str) -> int:
    """VmRSS: bytes now; VmHWM: the most there were."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(folder: Path, precision: str) -> dict[str, int]:
    """In this process, once."""
    import accelerate.hooks  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from cadenza.decoding import Engine, EngineConfig
    from cadenza.models import LoadConfig

    name, _, group_size = precision.partition("-") if precision.startswith("int4") else (precision, "", "")
    load = LoadConfig(dtype="float32", device="cpu")
    if name in ("float32", "bfloat16"):
        load = LoadConfig(dtype=name, device="cpu")  # type: ignore[arg-type]
    elif group_size:
        load = LoadConfig(
            dtype="float32", device="cpu", quantization="int4", quantization_group_size=int(group_size)
        )
    else:
        load = LoadConfig(dtype="float32", device="cpu", quantization=name)  # type: ignore[arg-type]
    resting = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with Engine.load(str(folder), load, EngineConfig(max_num_seqs=4, kv_cache_memory_gb=0.25)) as engine:
        engine.generate("A few words", temperature=0, max_tokens=4, ignore_eos=True)
        return {
            "peak_bytes": resident("VmHWM") - resting,
            "resting_bytes": resting,
            "weight_bytes": engine.model.weight_bytes,
            "float32_bytes": engine.model.num_parameters * 4,
        }


def measured(folder: Path, precision: str, cache: Path) -> dict[str, int] | str:
    """In a fresh process; a line of text where it cannot be."""
    command = [sys.executable, __file__, "--measure", precision, "--folder", str(folder)]
    environment = os.environ | {"CADENZA_CACHE": str(cache)}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        return process.stderr.strip().splitlines()[-1]
    found: dict[str, int] = json.loads(process.stdout.splitlines()[-1])
    return found


def both_starts(folder: Path, precision: str) -> list[dict[str, int]] | str:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="cache-") as cache:
        starts = []
        for _ in range(2):
            outcome = measured(folder, precision, Path(cache))
            if isinstance(outcome, str):
                return outcome
            starts.append(outcome)
        return starts


def show(results: dict[str, list[dict[str, int]]]) -> None:
    table = Table("precision", "weights MB", "first start MB", "again MB", "of float32's bytes", "limit MB")
    for precision, (first, again) in results.items():
        share, whole = LIMITS.get(precision), first["float32_bytes"]
        peak = max(first["peak_bytes"], again["peak_bytes"])
        limit = None if share is None else share * whole + ALLOWANCE
        table.add_row(
            precision,
            f"{first['weight_bytes'] / 1e6:.0f}",
            f"{first['peak_bytes'] / 1e6:.0f}",
            f"{again['peak_bytes'] / 1e6:.0f}",
            f"{peak / whole:.3f}",
            "" if limit is None else f"{limit / 1e6:.0f}: {'kept' if peak <= limit else 'EXCEEDED'}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32", *LIMITS])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cadenza-")) / "llama"
    try:
        if not (folder / "config.json").is_file():
            make_model(folder)
        if not (folder / "tokenizer.json").is_file():
            add_tokenizer(folder)
        results, failed = {}, {}
        for precision in options.precisions:
            outcome = both_starts(folder, precision)
            if isinstance(outcome, str):
                failed[precision] = outcome
            else:
                results[precision] = outcome
    finally:
        if options.folder is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
    if options.json:
        print(json.dumps({"results": results, "failed": failed}, indent=2))
        return
    show(results)
    for precision, reason in failed.items():
        print(f"{precision} failed: {reason}")


if __name__ == "__main__":
    main()
