"""Progress of long work: shown to a person at a terminal, kept out of logs and pipes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress_bars_on_terminals_only() -> Iterator[None]:
    """transformers' bars, for the time of the block."""
    from transformers.utils import logging

    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
