"""The terminals of Lark's library `common`, as patterns.

Its lazy ones (ESCAPED_STRING, C_COMMENT) are written as what a lexer makes of them: they end where they first can.
"""

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.limits import Effort

_EXPONENT = r"[eE][+-]?[0-9]+"
_DECIMAL = r"([0-9]+\.[0-9]*|\.[0-9]+)"
_FLOAT = rf"([0-9]+{_EXPONENT}|{_DECIMAL}({_EXPONENT})?)"
_NUMBER = rf"({_FLOAT}|[0-9]+)"

COMMON = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[a-fA-F0-9]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": _DECIMAL,
    "_EXP": _EXPONENT,
    "FLOAT": _FLOAT,
    "SIGNED_FLOAT": rf"[+-]?{_FLOAT}",
    "NUMBER": _NUMBER,
    "SIGNED_NUMBER": rf"[+-]?{_NUMBER}",
    "ESCAPED_STRING": r'"([^"\\\n]|\\[^\n])*"',
    "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "WS_INLINE": r"[ \t]+",
    "WS": r"[ \t\f\r\n]+",
    "CR": r"\r",
    "LF": r"\n",
    "NEWLINE": r"(\r?\n)+",
    "SH_COMMENT": r"#[^\n]*",
    "CPP_COMMENT": r"//[^\n]*",
    "C_COMMENT": r"/\*([^*]|\*+[^*/])*\*+/",
    "SQL_COMMENT": r"--[^\n]*",
}


def common_terminal(name: str, effort: Effort) -> Expression | None:
    pattern = COMMON.get(name)
    return None if pattern is None else parse_regex(pattern, "python", effort)
