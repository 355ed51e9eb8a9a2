"""The text of a grammar, and its places as people name them. Knows no grammar language."""

from dataclasses import dataclass

from cadenza.decoding.constraints.errors import ConstraintError


@dataclass(frozen=True, slots=True)
class Source:
    text: str

    def where(self, position: int) -> str:
        line = self.text.count("\n", 0, position) + 1
        column = position - (self.text.rfind("\n", 0, position) + 1) + 1
        return f"line {line}, column {column}"

    def error(self, message: str, position: int) -> ConstraintError:
        return ConstraintError(message, self.where(position))

    def near(self, position: int) -> str:
        """What stands at the position, for an error message."""
        rest = self.text[position : position + 20].split("\n", 1)[0]
        if position >= len(self.text):
            return "the end"
        return repr(rest) if rest.strip() else "the end of the line"
