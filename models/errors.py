"""The one error of the loader: a mistake or a shortage that the user can act on, said in one line.

It knows nothing of HTTP or exit codes; the command line prints the message and exits with 1.
"""


class ModelError(Exception):
    """A model that cannot be found, read, trusted, held in memory or run; the message is one clear line."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's exception says, folded into a single line fit for a `ModelError`."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= limit else text[: limit - 1] + "…"
