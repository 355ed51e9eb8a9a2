"""What can be wrong with a constraint. One line each, fit to be shown to the caller as it is."""


class ConstraintError(ValueError):
    """The constraint is malformed, matches nothing, or asks for something that is not enforced exactly.

    where: the place inside the constraint's source, as its language names places: a JSON pointer such as
    `#/properties/age/not`, a line and column, a position. Already part of the message.
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message if where is None else f"{message} (at {where})")
        self.message = message
        self.where = where

    def __reduce__(self) -> "tuple[type[ConstraintError], tuple[str, str | None]]":
        return type(self), (self.message, self.where)  # it crosses from the process that compiles


class ConstraintTooComplex(ConstraintError):
    """A limit on size, states, memory or time was hit; the message names the limit and its value."""


class MatcherError(RuntimeError):
    """A matcher failed while a request ran. Fails that request only."""
