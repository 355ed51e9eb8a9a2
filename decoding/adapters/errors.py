"""What can be wrong with a request about adapters. The server gives each its HTTP status."""

from cadenza.decoding.request import RequestError


class UnknownAdapter(RequestError):
    """There is no adapter of that name (404)."""


class GenerationMismatch(RequestError):
    """The adapter is not at the generation that the caller expected, or exists already (409)."""


class AdapterRefused(RequestError):
    """The adapter cannot be served exactly: a wrong shape, a kind that is not supported, a damaged file (400)."""


class PathNotAllowed(RequestError):
    """Adapters are not loaded from there (403)."""


class AdaptersBusy(RuntimeError):
    """There was no room for an adapter, or it was not loaded, within the time that a request may wait (503)."""
