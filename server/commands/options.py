"""Options that several commands share. What the user does not say is left to the defaults of the engine's and
the loader's own configuration, so that no default is written twice.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from cadenza.decoding.adapters.module import LoraModule, first_duplicate, name_fault
from cadenza.models.errors import ModelError

if TYPE_CHECKING:
    from cadenza.decoding import EngineConfig
    from cadenza.models import LoadConfig

MODEL_HELP = "an alias (smollm2), a Hugging Face id, a local folder, or a .gguf file"


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--revision", help="branch, tag or commit of a Hugging Face model")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--allow-pickle", action="store_true", help="load weights from pickle files, which can run code")


def add_loading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="of activations and of weights that are not quantized (default: auto, float32 on a CPU)",
    )
    add(
        "--quantization",
        choices=["none", "int8", "int4", "nf4", "fp8", "llm-int8"],
        help="store weights in fewer bits (default: none)",
    )
    add(
        "--quantization-group-size",
        type=int,
        choices=[32, 64, 128],
        help="weights per scale in int4 (default: 32)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        help="weights that have no room stay on disk: 2GiB, 1500MB, or by device, cuda:0=20GiB,cpu=30GiB",
    )
    add("--cpu-offload-gb", type=float, metavar="GIB", help="on a GPU: weights that stay in CPU memory")
    add(
        "--offload-folder",
        metavar="PATH",
        help="for offloaded weights that no file holds as they are needed (default: in CADENZA_CACHE)",
    )
    add("--max-model-len", type=int, metavar="TOKENS", help="shorten the context")
    add("--chat-template", metavar="PATH", help="a template file, or the template")
    add(
        "--generation-config",
        metavar="auto|none|PATH",
        help="where sampling defaults come from (default: auto, the model's own)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--max-num-seqs", type=int, help="sequences that run at once")
    add("--max-num-batched-tokens", type=int, help="tokens per step")
    add("--max-queue", type=int, help="requests that may wait; more get a 429")
    add("--kv-cache-memory-gb", type=float, help="memory for the KV cache")
    add("--block-size", type=int, help="tokens per block of the KV cache")
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="reuse the KV cache of equal beginnings (default: on)",
    )
    add(
        "--max-logprobs",
        type=int,
        help="most alternatives a request may have",
    )
    add(
        "--logprobs-mode",
        choices=["raw_logprobs", "processed_logprobs"],
        help="log-probabilities before or after penalties, temperature and truncation",
    )
    add("--seed", type=int, help="makes requests without a seed repeatable")
    add(
        "--speculative",
        metavar="ngram|MODEL",
        help="who drafts tokens for the model to check several at once: earlier text, or a smaller model",
    )
    add("--num-speculative-tokens", type=int, help="most drafts per sequence and step")
    _add_adapters(parser)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--enable-lora", action="store_true", help="requests may name adapters")
    add(
        "--lora-modules",
        nargs="+",
        action="extend",
        type=_lora_module,
        metavar="NAME=PATH",
        help='adapters to start with: a folder or a Hugging Face id, or {"name", "path", "base_model_name"} as JSON;'
        " implies --enable-lora",
    )
    add("--max-loras", type=int, help="different adapters in one step (default: 8)")
    add("--max-lora-rank", type=int, help="adapters of a higher rank are refused (default: 16)")
    add("--max-cpu-loras", type=int, help="adapters in memory (default: twice --max-loras)")


def add_own_adapters(parser: argparse.ArgumentParser) -> None:
    """For a conversation that is with one model throughout."""
    group = parser.add_argument_group("adapters")
    add = partial(group.add_argument, default=argparse.SUPPRESS)
    add("--lora", nargs="+", metavar="PATH", help="adapters to talk to: folders or Hugging Face ids")
    add("--max-lora-rank", type=int, help="adapters of a higher rank are refused (default: 16)")


def _lora_module(text: str) -> LoraModule:
    try:
        return LoraModule(**_named(text))
    except ModelError as error:
        raise argparse.ArgumentTypeError(f"{error}, in {text}") from None


def _named(text: str) -> dict[str, str]:
    if not text.startswith("{"):
        name, separator, path = text.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"takes NAME=PATH, or JSON: {text}")
        return {"name": name, "path": path}
    try:
        named = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text}") from None
    known = {field.name for field in fields(LoraModule)}
    if not {"name", "path"} <= named.keys() <= known or not all(isinstance(n, str) for n in named.values()):
        raise argparse.ArgumentTypeError(
            f'takes "name", "path" and "base_model_name", all of them text: {text}'
        )
    return dict(named)


def _given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in fields(config) if hasattr(args, field.name)}


def load_config(args: argparse.Namespace) -> "LoadConfig":
    from cadenza.models import LoadConfig

    return LoadConfig(**_given(args, LoadConfig))


def engine_config(args: argparse.Namespace) -> "EngineConfig":
    """Raises ModelError where flags contradict."""
    from cadenza.decoding import EngineConfig

    given = _given(args, EngineConfig)
    if "lora_modules" in given:
        given.update(lora_modules=tuple(given["lora_modules"]), enable_lora=True)
    check_adapter_flags(args)
    return EngineConfig(**given)


def conversation_config(args: argparse.Namespace) -> "EngineConfig":
    """One conversation needs one place in the batch, the KV cache for it, and slots for its adapters."""
    from cadenza.decoding import EngineConfig

    paths = getattr(args, "lora", [])
    if not paths:
        if hasattr(args, "max_lora_rank"):
            raise ModelError("--max-lora-rank needs --lora")
        return EngineConfig(max_num_seqs=1)
    modules = tuple(map(LoraModule, _names_of(paths), paths))
    bounds = {"max_lora_rank": args.max_lora_rank} if hasattr(args, "max_lora_rank") else {}
    return EngineConfig(
        max_num_seqs=1, enable_lora=True, max_loras=len(modules), lora_modules=modules, **bounds
    )


def _names_of(paths: Sequence[str]) -> list[str]:
    """What messages call the adapters of a conversation: their folders, as far as these can be names, and differ."""
    names = [PurePath(path).name for path in paths]
    if first_duplicate(names) is None and not any(map(name_fault, names)):
        return names
    return [f"lora-{number}" for number in range(1, len(paths) + 1)]


def check_adapter_flags(args: argparse.Namespace) -> None:
    """Flags of adapters are of no use where requests cannot name any: told, rather than ignored."""
    if hasattr(args, "enable_lora") or hasattr(args, "lora_modules"):
        return
    for name in _ADAPTER_FLAGS:
        if hasattr(args, name):
            raise ModelError(f"--{name.replace('_', '-')} needs --enable-lora, or --lora-modules")


_ADAPTER_FLAGS = (
    "max_loras",
    "max_lora_rank",
    "max_cpu_loras",
    "lora_allowed_roots",
    "lora_allowed_hub_ids",
)
