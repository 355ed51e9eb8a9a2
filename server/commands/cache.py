"""`cadenza pull` and `cadenza models`: what is on this machine."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadenza.models.source import CachedModel


def pull(args: argparse.Namespace) -> int:
    """Fetch a model, and print where it lies."""
    from cadenza.models import resolve

    path = resolve(
        args.model,
        revision=getattr(args, "revision", None),
        allow_pickle=getattr(args, "allow_pickle", False),
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )
    print(path)
    return 0


def models(args: argparse.Namespace) -> int:
    """List the models that need no network, and their quantized copies."""
    from cadenza.models import cached_models
    from cadenza.models.source import quantized_copies

    found, copies = cached_models(), quantized_copies()
    if not found:
        print("no models are cached; `cadenza pull smollm2` fetches a small one")
    _print_table(found)
    if copies:
        print("quantized copies, which may be deleted; they are made again when needed:")
        _print_table(copies)
    return 0


def _print_table(rows: "list[CachedModel]") -> None:
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        print(f"{row.name:<{width}}  {row.bytes / 1e9:8.2f} GB  {row.path}")
