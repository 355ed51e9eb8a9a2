"""What cannot be asked for is refused by name, hostile constraints cost others nothing, and equal ones compile once."""

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.constraints.worker_process import WorkerProcess

COMPLETIONS = "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HOSTILE_SECONDS = 10.0  # of a busy machine; an idle one takes a fifth of it
GAP_SECONDS = 2.0


def outputs(**kind: Any) -> dict[str, Any]:
    return {"structured_outputs": kind}


def strict(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "strict": True, "schema": schema},
        }
    }


def refusal(http: httpx.Client, **body: Any) -> Any:
    response = http.post(COMPLETIONS, json={"prompt": "A", "max_tokens": 16, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
    (outputs(regex="a", choice=["a"]), "structured_outputs.choice"),
    ({"regex": "a", "stop": "x"}, "stop"),
    ({"regex": "a", "stop_token_ids": [5]}, "stop_token_ids"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"regex": "a", "min_tokens": 1}, "min_tokens"),
    ({"regex": "a", "bad_words": ["x"]}, "bad_words"),
    ({"regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"ebnf": 'start: "a"'}, "ebnf"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
]


@pytest.mark.parametrize(
    ("body", "param"), CONFLICTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_conflicts(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert refusal(http, **body)["param"] == param


def test_a_stop_of_the_model_is_no_conflict(http: httpx.Client) -> None:
    """Clients that list the model's own end of text ask for nothing that would cut an answer."""
    body = {"prompt": "A", "regex": "ab", "stop_token_ids": [2], "max_tokens": 4}
    assert http.post(COMPLETIONS, json=body).json()["choices"][0]["text"] == "ab"


NOT_ENFORCED: list[tuple[dict[str, Any], str, str]] = [
    (outputs(regex="(a"), "structured_outputs.regex", "position 0"),
    ({"guided_regex": r"(a+)\1"}, "guided_regex", "backreference"),
    ({"guided_regex": r"[^\s\S]"}, "guided_regex", "no text satisfies"),
    (
        outputs(grammar="start: nope"),
        "structured_outputs.grammar",
        "'nope' is not defined (at line 1, column 8)",
    ),
    ({"grammar": 'root ::= "a" root'}, "grammar", "no text satisfies"),
    ({"ebnf": 'root ::= "a'}, "ebnf", "line 1"),
    (outputs(json={"type": "strin"}), "structured_outputs.json", "#/type"),
    (
        {"guided_json": {"type": "object", "properties": {"a": {"$dynamicRef": "#x"}}}},
        "guided_json",
        "$dynamicRef is not supported (at #/properties/a/$dynamicRef)",
    ),
    (
        {"json_schema": {"type": "array", "items": {"type": "string", "format": "idn-hostname"}}},
        "json_schema",
        "#/items/format",
    ),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "json_schema", "no value satisfies"),
    ({"json_schema": {"$ref": "http://127.0.0.1:9/x"}}, "json_schema", "#/$ref"),
    (strict(SCHEMA), "response_format.json_schema.schema", "additionalProperties"),
    (
        {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "sequence", "elements": [{"type": "x"}]},
            }
        },
        "response_format",
        "#/format/elements/0/type",
    ),
]


@pytest.mark.parametrize(("body", "param", "says"), NOT_ENFORCED, ids=[case[2] for case in NOT_ENFORCED])
def test_what_is_not_enforced_is_refused(
    http: httpx.Client, body: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(http, **body)
    assert (error["param"], error["code"], error["type"]) == (
        param,
        "invalid_constraint",
        "invalid_request_error",
    )
    assert says in error["message"]


def test_lone_surrogates(http: httpx.Client) -> None:
    """No text of UTF-8 has them: neither the body's nor an answer's."""
    for field in (
        '"regex": "\\ud800"',
        '"guided_choice": ["ok", "\\ud800"]',
        '"guided_json": {"enum": ["\\ud800"]}',
    ):
        body = '{"prompt": "A", ' + field + "}"
        response = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert "no text satisfies" in refusal(http, regex=r"\ud800")["message"]


def nested(opening: str, inner: str, closing: str, levels: int = 10_000) -> str:
    return opening * levels + inner + closing * levels


def lines(*parts: str) -> str:
    return "\n".join(parts)


HOSTILE: dict[str, dict[str, Any]] = {
    "deep schema": outputs(json=nested('{"items":', "{}", "}")),
    "deep pattern": outputs(regex=nested("(", "a", ")")),
    "deep Lark": outputs(grammar="start: " + nested("(", '"a"', ")")),
    "deep GBNF": outputs(grammar="root ::= " + nested("(", '"a"', ")")),
    "deep rules": outputs(
        grammar=lines("root ::= r0", *(f'r{n} ::= "(" r{n + 1} ")"' for n in range(10_000)), 'r10000 ::= "x"')
    ),
    "1 MB schema": outputs(json={"properties": {f"property_{n}": {"type": "string"} for n in range(32_000)}}),
    "many properties": outputs(
        json={"properties": {f"property_{n}": {"type": "string"} for n in range(9_000)}}
    ),
    "huge alternation": outputs(regex="|".join(f"word{n}" for n in range(40_000))),
    "many choices": outputs(choice=[f"word {n}" for n in range(100_000)]),
    "counted repetition": outputs(regex="a{1000000}"),
    "counted repetition in GBNF": outputs(grammar='root ::= "a"{1000000}'),
    "counted repetition in a schema": outputs(json={"type": "string", "minLength": 1_000_000}),
    "counted items": outputs(json={"type": "array", "minItems": 1_000_000, "items": {"type": "string"}}),
    "nested repetitions": outputs(regex="((a{1,100}){1,100}){1,10}"),
    "exponential automaton": outputs(regex=r"(.|\n)*x.{20}"),
    "exponential backtracking": outputs(regex="(a+)+b"),
    "billion laughs of templates": outputs(
        grammar=lines("start: t{t{t{t{t{t{t{laugh}}}}}}}", "t{x}: " + "x " * 10, 'laugh: "ha"')
    ),
    "billion laughs of rules": outputs(
        grammar=lines("root ::= r0", *(f"r{n} ::= " + f"r{n + 1} " * 10 for n in range(12)), 'r12 ::= "ha"')
    ),
    "billion laughs of references": outputs(
        json={
            "$defs": {
                f"d{n}": {"prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 10, "minItems": 10}
                for n in range(12)
            }
        }
        | {"$ref": "#/$defs/d0"}
    ),
    "combinations": outputs(
        json={
            "allOf": [
                {"anyOf": [{"properties": {f"p{n}": {"const": m}}} for m in range(10)]} for n in range(10)
            ]
        }
    ),
    "enum of one long string": outputs(json={"enum": ["x" * 200_000]}),
    "enum of many strings": outputs(json={"enum": [f"v{n}" for n in range(200_000)]}),
    "whitespace": {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "( {1,1000}){1,1000}"}},
    "left recursion": outputs(grammar="root ::= root"),
    "every reading": outputs(grammar='root ::= "a" | root root | root root root'),
    "empty language": outputs(json=False),
    "no character": outputs(regex=r"[^\s\S]"),
}
ACCEPTED = {"huge alternation", "exponential backtracking", "every reading"}
PLAIN = {"prompt": "Once upon a time", "temperature": 1, "seed": 6, "max_tokens": 100, "ignore_eos": True}


class PlainStream(threading.Thread):
    """An unconstrained stream, and when its tokens came."""

    def __init__(self, base_url: str) -> None:
        super().__init__()
        self._base_url = base_url
        self.text = ""
        self.times: list[float] = []
        self.begun = threading.Event()

    def run(self) -> None:
        with (
            httpx.Client(base_url=self._base_url, timeout=120) as client,
            client.stream("POST", COMPLETIONS, json={**PLAIN, "stream": True}) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    self.times.append(time.monotonic())
                    self.begun.set()


async def send_all(base_url: str) -> dict[str, tuple[int, Any, float]]:
    """To each name: the status, the answer and the seconds it took. A few at once, more than there are workers."""
    slots = asyncio.Semaphore(3)

    async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, Any, float]:
        async with slots:
            begun = time.monotonic()
            response = await client.post(COMPLETIONS, json={"prompt": "A", "max_tokens": 8, **body})
            return response.status_code, response.json(), time.monotonic() - begun

    async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        found = await asyncio.gather(*(send(client, body) for body in HOSTILE.values()))
    return dict(zip(HOSTILE, found, strict=True))


def test_hostile_constraints_beside_a_stream(http: httpx.Client, base_url: str) -> None:
    alone = http.post(COMPLETIONS, json=PLAIN).json()["choices"][0]["text"]
    stream = PlainStream(base_url)
    stream.start()
    assert stream.begun.wait(10)
    found = asyncio.run(send_all(base_url))
    stream.join()

    for name, (status, answer, seconds) in found.items():
        assert status == (200 if name in ACCEPTED else 400), (name, answer)
        assert seconds < HOSTILE_SECONDS, name
        assert status == 200 or answer["error"]["param"].startswith("structured_outputs."), name
    assert found["exponential backtracking"][1]["choices"][0]["text"].endswith("b")
    assert set(found["every reading"][1]["choices"][0]["text"]) == {"a"}
    assert found["huge alternation"][1]["choices"][0]["text"] in HOSTILE["huge alternation"][
        "structured_outputs"
    ]["regex"].split("|")

    assert stream.text == alone
    gaps = [later - earlier for earlier, later in zip(stream.times, stream.times[1:], strict=False)]
    assert max(gaps) < GAP_SECONDS
    assert http.get("/health").status_code == 200


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each source was compiled, every time slowly."""
    counts: Counter[str] = Counter()
    ask = WorkerProcess.ask

    def slow(self: WorkerProcess, spec: ConstraintSpec) -> Any:
        counts[spec.source] += 1
        time.sleep(0.6)
        return ask(self, spec)

    monkeypatch.setattr(WorkerProcess, "ask", slow)
    return counts


@pytest.mark.parametrize(
    ("pattern", "status"), [("once|twice", 200), ("(once|twice", 400)], ids=["accepted", "refused"]
)
def test_equal_constraints_compile_once(
    base_url: str, compiled: Counter[str], pattern: str, status: int
) -> None:
    """Also if the first who asks leaves, and again later: by whatever name the constraint is asked for."""
    prompt = {"prompt": "How often?", "seed": 1, "max_tokens": 6}
    bodies = [{**prompt, name: pattern} for name in ("regex", "guided_regex")]
    bodies += [{**prompt, **outputs(regex=pattern)}] * 4

    async def first_leaves(client: httpx.AsyncClient) -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post(COMPLETIONS, json=bodies[0], timeout=0.2)

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            _, *answers = await asyncio.gather(
                first_leaves(client), *(client.post(COMPLETIONS, json=body) for body in bodies)
            )
            return [*answers, await client.post(COMPLETIONS, json=bodies[0])]

    answers = asyncio.run(ask_all())
    assert [answer.status_code for answer in answers] == [status] * 7
    assert compiled == {pattern: 1}
    if status == 200:
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    else:
        params = [answer.json()["error"]["param"] for answer in answers]
        assert params == ["regex", "guided_regex", *["structured_outputs.regex"] * 4, "regex"]


def test_a_slow_compilation_delays_nobody(
    http: httpx.Client, compiled: Counter[str], metric: Callable[[str], float]
) -> None:
    slow = threading.Thread(
        target=http.post,
        args=(COMPLETIONS,),
        kwargs={"json": {"prompt": "A", "regex": "slowly", "max_tokens": 8}},
    )
    slow.start()
    while not compiled:
        time.sleep(0.005)
    before = metric("generation_tokens_total")
    assert (
        http.post(COMPLETIONS, json={"prompt": "A", "max_tokens": 2, "ignore_eos": True}).status_code == 200
    )
    assert metric("generation_tokens_total") == before + 2
    assert slow.is_alive(), "the plain answer was there before the constraint was compiled"
    slow.join()
