"""Numbers as people read them. Units are those of the flags: GiB is 1024³ bytes."""


def gib(size: int) -> str:
    """`3.97 GiB`, `12.5 MiB`, `640 B`: three digits that say something."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size >= factor or (unit == "GiB" and size >= 0.1 * factor):
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def count(number: int) -> str:
    """`1.10 B`, `134.5 M`, `64.2 K`: as model cards have it."""
    if number >= 10**9:
        return f"{number / 1e9:.2f} B"
    if number >= 10**6:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.1f} K" if number >= 10**3 else str(number)
