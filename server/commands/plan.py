"""`cadenza plan`: what `serve` would make of a model with the same flags, before anything is loaded.

A table for people, or JSON with sizes in bytes. Exit status 1 where `serve` would refuse. Decides nothing itself:
`decoding.planning` does.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from cadenza.models.errors import ModelError
from cadenza.server.commands.options import engine_config, load_config
from cadenza.server.commands.quantities import count, gib
from cadenza.server.commands.report import at_once

if TYPE_CHECKING:
    from rich.table import Table

    from cadenza.decoding import EngineConfig
    from cadenza.decoding.planning import ModelPlan, PrecisionPlan


def plan(args: argparse.Namespace) -> int:
    from cadenza.decoding.planning import plan_model

    config = engine_config(args)
    _check_adapters(config)
    found = plan_model(args.model, load_config(args), config)
    if args.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        _print(found, config)
    return 0 if found.chosen.refusal is None else 1


def _check_adapters(config: "EngineConfig") -> None:
    """Those of --lora-modules are there, as far as names of files tell; they are read by `serve` only."""
    from cadenza.models.adapters.locate import locate_trusted

    for module in config.lora_modules:
        try:
            locate_trusted(module.path)
        except ModelError as error:
            raise ModelError(f"adapter {module.name}: {error}") from error


def as_json(plan: "ModelPlan") -> dict[str, Any]:
    """Keys are stable; what does not apply is null. Sizes are in bytes."""
    outline, parameters, alternative = plan.outline, plan.parameters, plan.alternative
    per_token = _kv_bytes_per_token(plan, plan.chosen)
    return {
        "model": {
            "name": outline.name,
            "location": outline.location,
            "architecture": outline.model_class.__name__,
            "checkpoint_dtype": outline.checkpoint.float_dtype,
            "checkpoint_quantization": outline.quantized_by,
            "note": outline.note,
            "context_length": plan.max_model_len,
            "parameters": {
                "total": parameters.total,
                "embedding": parameters.embedding,
                "layers": list(parameters.layers),
                "active": parameters.active,
            },
        },
        "machine": {
            name: {"free_bytes": memory.free, "total_bytes": memory.total, "bound": memory.bound}
            for name, memory in plan.machine.items()
        },
        "kv_cache": {
            "bytes_per_token": per_token,
            "bytes_per_full_context": per_token * plan.max_model_len,
            "layers": [[shape.num_kv_heads, shape.key_dim, shape.value_dim] for shape in plan.shapes],
        },
        "precisions": [_precision_json(precision) for precision in plan.precisions],
        "serve": {
            "device": str(plan.device),
            "dtype_reason": plan.dtype_reason,
            "draft": None if plan.draft is None else plan.draft.name,
            "alternative": None if alternative is None else alternative.name,
            **_precision_json(plan.chosen),
        },
    }


def _precision_json(plan: "PrecisionPlan") -> dict[str, Any]:
    sizes, memory = plan.sizes, plan.memory
    return {
        "name": plan.name,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "group_size": plan.group_size,
        "weight_bytes": None if sizes is None else sizes.total,
        "weight_bytes_in_use": None if sizes is None else sizes.in_use,
        "full_precision_bytes": None if sizes is None else dict(sizes.kept),
        "offload": _offload_json(plan),
        "refusal": plan.refusal,
        "adapter_bytes": plan.adapter_bytes,
        "step_bytes": None if memory is None else memory.demand.step_bytes,
        "kv_cache_bytes": None if memory is None else memory.num_bytes,
        "kv_cache_tokens": None if memory is None else memory.num_tokens,
        "kv_cache_reason": None if memory is None else memory.reason,
        "max_model_len": None if memory is None else memory.max_model_len,
        "max_model_len_reason": None if memory is None else memory.context_reason,
        "max_num_seqs": None if memory is None else memory.demand.max_num_seqs,
        "full_length_concurrency": None if memory is None else memory.full_length_concurrency,
        "full_concurrency_length": None if memory is None else memory.full_concurrency_length,
    }


def _offload_json(plan: "PrecisionPlan") -> dict[str, int] | None:
    if plan.placement is None:
        return None
    return {
        "resident_bytes": plan.placement.resident_bytes,
        "cpu_bytes": plan.placement.cpu_bytes,
        "disk_bytes": plan.placement.disk_bytes,
        "working_bytes": plan.placement.working_bytes,
    }


def _kv_bytes_per_token(plan: "ModelPlan", precision: "PrecisionPlan") -> int:
    import torch

    dtype: torch.dtype = getattr(torch, precision.dtype)
    return sum(shape.bytes_per_token(dtype) for shape in plan.shapes)


def _print(plan: "ModelPlan", config: "EngineConfig") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:  # a pipe has no width: nothing is cut
        console = Console(highlight=False, markup=False, emoji=False, width=160)
    with console.capture() as capture:
        console.print(_facts(plan))
        console.print(_precisions(plan))
        console.print(_decisions(plan, config))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _facts(plan: "ModelPlan") -> "Table":
    outline, parameters = plan.outline, plan.parameters
    table = _grid()
    table.add_row("model", f"{outline.name} ({outline.model_class.__name__}) in {outline.location}")
    layers = sorted(set(parameters.layers))
    shown = " to ".join(count(size) for size in ([layers[0], layers[-1]] if len(layers) > 1 else layers))
    parts = f"token embedding {count(parameters.embedding)}, {len(parameters.layers)} layers of {shown}"
    active = "" if parameters.active == parameters.total else f", {count(parameters.active)} active per token"
    table.add_row("parameters", f"{count(parameters.total)}{active}: {parts}")
    stored = outline.checkpoint.float_dtype or "no floating-point type"
    quantized = "" if outline.quantized_by is None else f", quantized by {outline.quantized_by}"
    table.add_row("checkpoint", f"{stored}{quantized}" + (f"; {outline.note}" if outline.note else ""))
    per_token = _kv_bytes_per_token(plan, plan.chosen)
    full = f"{gib(per_token * plan.max_model_len)} for a sequence of {plan.max_model_len}"
    table.add_row("KV cache", f"{per_token} bytes per token in {plan.chosen.dtype}, {full}")
    for name, memory in plan.machine.items():
        table.add_row("memory", f"{name}: {gib(memory.free)} free of {gib(memory.total)} ({memory.bound})")
    return table


def _precisions(plan: "ModelPlan") -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("precision", no_wrap=True)
    for heading in ("weights", "KV cache", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"at once, on {plan.device}")
    for precision in plan.precisions:
        is_chosen = (precision.name, precision.dtype) == (plan.chosen.name, plan.chosen.dtype)
        weights = "" if precision.sizes is None else gib(precision.sizes.total)
        memory = precision.memory
        name = precision.name + (" *" if is_chosen else "")
        if memory is None:
            table.add_row(name, weights, "", "", _short(precision))
        else:
            room = f"{memory.full_length_concurrency} of {memory.max_model_len} tokens"
            if precision.placement is not None:
                away = precision.placement.cpu_bytes + precision.placement.disk_bytes
                room += f"; {gib(away)} of weights wait elsewhere" if away else ""
            table.add_row(name, weights, gib(memory.num_bytes), str(memory.num_tokens), room)
    return table


def _short(plan: "PrecisionPlan") -> str:
    """What is wrong, without the numbers: they are below for what was chosen, and in the JSON for all."""
    refusal = plan.refusal or ""
    return refusal.partition(":")[0] if plan.sizes is not None else refusal


def _decisions(plan: "ModelPlan", config: "EngineConfig") -> "Table":
    chosen, table = plan.chosen, _grid()
    if chosen.refusal is not None:
        table.add_row("serve", f"would refuse: {chosen.refusal}")
        if plan.alternative is not None:
            table.add_row("", f"it would take {plan.alternative.name}")
        return table
    sizes, memory = chosen.sizes, chosen.memory
    assert sizes is not None
    assert memory is not None
    table.add_row("serve *", f"{chosen.name} on {plan.device} ({chosen.dtype}: {plan.dtype_reason})")
    kept = ", ".join(f"{gib(size)} {what}" for what, size in sizes.kept.items())
    table.add_row("weights", gib(sizes.total) + (f"; in {chosen.dtype}: {kept}" if kept else ""))
    placement = chosen.placement
    if placement is not None:
        away = [(placement.cpu_bytes, "in CPU memory"), (placement.disk_bytes, "on disk")]
        parts = [(placement.resident_bytes, f"on {plan.device}"), *(part for part in away if part[0])]
        table.add_row("offload", ", ".join(f"{gib(size)} {where}" for size, where in parts))
    table.add_row("KV cache", f"{memory.num_tokens} tokens, {gib(memory.num_bytes)} ({memory.reason})")
    table.add_row("context", f"{memory.max_model_len} tokens ({memory.context_reason})")
    table.add_row("at once", at_once(memory))
    if config.enable_lora:
        slots = f"at most {gib(chosen.adapter_bytes)} for {config.max_loras} in a step, of rank {config.max_lora_rank}"
        table.add_row("adapters", f"{slots} or less, counted above")
    if plan.draft is not None:
        table.add_row("drafts", f"by {plan.draft.name}, counted above")
    return table


def _grid() -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=10)
    table.add_column()
    return table
