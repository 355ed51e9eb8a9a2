"""What `cadenza serve` says of adapters beside the engine's own settings: who may change them, and from where.

Contradictions are found before anything is loaded.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cadenza.models.errors import ModelError
from cadenza.server.commands.options import check_adapter_flags

if TYPE_CHECKING:
    from cadenza.models.adapters.locate import AdapterSources
    from cadenza.server.service import ServerSettings

_ALLOWING = ("CADENZA_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


def add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters while the server runs")
    add = partial(group.add_argument, nargs="+", action="extend", default=argparse.SUPPRESS)
    add("--lora-allowed-roots", metavar="PATH", help="folders below which adapters may be loaded")
    add(
        "--lora-allowed-hub-ids",
        metavar="ID",
        help="Hugging Face ids of adapters that may be loaded; org/* for all of an organisation's",
    )


def allows_updates() -> bool:
    return any(os.environ.get(name, "").strip().lower() in ("1", "true") for name in _ALLOWING)


def adapter_sources(args: argparse.Namespace) -> "AdapterSources | None":
    """None: from nowhere."""
    roots = tuple(Path(root).expanduser() for root in getattr(args, "lora_allowed_roots", ()))
    hub_ids = tuple(getattr(args, "lora_allowed_hub_ids", ()))
    for root in roots:
        if not root.is_dir():
            raise ModelError(f"--lora-allowed-roots: there is no folder {root}")
    if not roots and not hub_ids:
        return None
    from cadenza.models.adapters.locate import AdapterSources

    return AdapterSources(roots, hub_ids)


def check_adapters(args: argparse.Namespace, settings: "ServerSettings") -> None:
    """Raises ModelError for flags that contradict, or that nothing would come of."""
    check_adapter_flags(args)
    if settings.adapter_sources is not None and not settings.allows_updates:
        flag = "--lora-allowed-roots" if hasattr(args, "lora_allowed_roots") else "--lora-allowed-hub-ids"
        raise ModelError(
            f"{flag} needs --admin-api-key, or {_ALLOWING[0]}=1: adapters cannot be loaded otherwise"
        )
    modules = getattr(args, "lora_modules", ())
    if not modules:
        return
    from cadenza.models.source import served_name

    served = settings.served_model_names or (served_name(args.model),)
    for module in modules:
        if module.name in served:
            raise ModelError(f"--lora-modules: {module.name} is what the served model is called")
        if module.base_model_name is not None and module.base_model_name not in served:
            raise ModelError(
                f"--lora-modules: the base model of {module.name} is {module.base_model_name},"
                f" which is not served here ({', '.join(served)} is)"
            )
