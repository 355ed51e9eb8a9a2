"""`cadenza pull` and `cadenza models`: what is on this machine."""

import argparse


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
    """List the models that need no network."""
    from cadenza.models import cached_models

    found = cached_models()
    if not found:
        print("no models are cached; `cadenza pull smollm2` fetches a small one")
        return 0
    width = max(len(model.name) for model in found)
    for model in found:
        print(f"{model.name:<{width}}  {model.bytes / 1e9:8.2f} GB  {model.path}")
    return 0
