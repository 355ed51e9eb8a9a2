"""The names of `format` and what is written for each. Knows no other keyword.

Each expression lies inside what the specification it is named after allows, and inside what the `jsonschema`
package accepts. Repetitions that those leave open (fractions of a second, labels of a host) are bounded.
"""

from functools import cache

from cadenza.decoding.constraints.automata.expression import Expression
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.limits import Effort

_DAYS = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_FOURS = r"(?:0[48]|[2468][048]|[13579][26])"
_DATE = rf"(?:{_YEAR}-{_DAYS}|(?:[0-9]{{2}}{_FOURS}|{_FOURS}00)-02-29)"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_SPAN_OF_TIME = r"T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"
_SPAN_OF_DAYS = r"(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)"


def _label(most: int) -> str:
    return rf"[A-Za-z0-9](?:[A-Za-z0-9-]{{0,{most - 2}}}[A-Za-z0-9])?"


def _host(most: int, labels: int) -> str:
    return rf"(?:{_label(most)}\.){{0,{labels - 1}}}{_label(most)}"


# A name has at most 253 characters: few long labels or many short ones.
_HOST = rf"(?:{_host(63, 3)}|{_host(30, 8)}|{_host(12, 19)})"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@(?:{_host(63, 3)}|{_host(30, 8)})"

_IPV4 = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_H = r"[0-9A-Fa-f]{1,4}"
_LAST32 = rf"(?:{_H}:{_H}|{_IPV4})"
_IPV6 = (
    rf"(?:(?:{_H}:){{6}}{_LAST32}|::(?:{_H}:){{5}}{_LAST32}|(?:{_H})?::(?:{_H}:){{4}}{_LAST32}"
    rf"|(?:(?:{_H}:){{0,1}}{_H})?::(?:{_H}:){{3}}{_LAST32}|(?:(?:{_H}:){{0,2}}{_H})?::(?:{_H}:){{2}}{_LAST32}"
    rf"|(?:(?:{_H}:){{0,3}}{_H})?::{_H}:{_LAST32}|(?:(?:{_H}:){{0,4}}{_H})?::{_LAST32}"
    rf"|(?:(?:{_H}:){{0,5}}{_H})?::{_H}|(?:(?:{_H}:){{0,6}}{_H})?::)"
)


def _uri(more: str, private: str, relative: bool) -> str:
    """RFC 3986; `more` and `private` are the characters that RFC 3987 adds."""
    escape = r"%[0-9A-Fa-f]{2}"
    unreserved = rf"A-Za-z0-9._~!$&'()*+,;={more}\-"
    pchar = rf"(?:[{unreserved}:@]|{escape})"
    host = rf"(?:\[{_IPV6}\]|(?:[{unreserved}]|{escape})*)"
    authority = rf"(?:(?:[{unreserved}:]|{escape})*@)?{host}(?::[0-9]*)?"
    rooted = rf"//{authority}(?:/{pchar}*)*|/(?:{pchar}+(?:/{pchar}*)*)?"
    tail = rf"(?:\?(?:{pchar}|[/?{private}])*)?(?:#(?:{pchar}|[/?])*)?"
    absolute = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{rooted}|{pchar}+(?:/{pchar}*)*)?"
    if not relative:
        return absolute + tail
    first = rf"(?:[{unreserved}@]|{escape})+"
    return rf"(?:{absolute}|{rooted}|{first}(?:/{pchar}*)*)?{tail}"


_MORE = r"\u00A0-\uD7FF\uF900-\uFDCF\uFDF0-\uFFEF"
_PRIVATE = r"\uE000-\uF8FF"
_VARIABLE = (
    r"(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})(?:\.?(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2}))*(?::[1-9][0-9]{0,3}|\*)?"
)
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"


def _uuid(version: str) -> str:
    variant = "[89abAB]" if version.isdecimal() else "[0-9a-fA-F]"
    return rf"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{version}[0-9a-fA-F]{{3}}-{variant}[0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"


PATTERNS: dict[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P(?:[0-9]{{1,9}}W|{_SPAN_OF_DAYS}(?:{_SPAN_OF_TIME})?|{_SPAN_OF_TIME})",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": rf"(?:{_IPV4}|{_IPV6})",
    "uuid": _uuid("[0-9a-fA-F]"),
    **{f"uuid{version}": _uuid(str(version)) for version in range(1, 9)},
    "uri": _uri("", "", relative=False),
    "url": _uri("", "", relative=False),
    "uri-reference": _uri("", "", relative=True),
    "iri": _uri(_MORE, _PRIVATE, relative=False),
    "iri-reference": _uri(_MORE, _PRIVATE, relative=True),
    "uri-template": (
        r"(?:[!#$&()*+,./0-9:;=?@A-Z\[\]_a-z~-]|%[0-9A-Fa-f]{2}"
        rf"|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*"
    ),
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,9}})(?:#|{_POINTER})",
}

ANNOTATIONS = frozenset(
    {
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double", "decimal",
        "byte", "binary", "password", "utc-millisec", "path", "file-path", "directory-path",
    }
)  # fmt: skip
"""Names, of OpenAPI and of generators of schemas, that do not restrict strings."""


@cache
def format_expression(name: str) -> Expression:
    return parse_regex(PATTERNS[name], "python", Effort())
