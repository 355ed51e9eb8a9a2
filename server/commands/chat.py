"""`cadenza run`: a conversation in the terminal, with the engine in this process and no HTTP.

Ctrl-C stops the answer, ctrl-D ends the conversation.
"""

import argparse
import gc
import signal
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from cadenza.decoding.request import RequestError
from cadenza.server.commands.options import conversation_config, load_config

if TYPE_CHECKING:
    from cadenza.decoding import Engine
    from cadenza.decoding.adapters.set import AdapterSet
    from cadenza.decoding.request import SamplingParams


def run(args: argparse.Namespace) -> int:
    gc.disable()  # until all is loaded: it would look for garbage among modules, for half a second
    from cadenza.decoding import Engine

    # A shell that starts us in the background has it ignored; here it means "stop the answer".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.perf_counter()
    engine = Engine.load(args.model, load_config(args), conversation_config(args))
    gc.enable()
    try:
        sampling = _sampling(engine, args)
        _say(f"{_title(engine)} is ready after {time.perf_counter() - start:.1f} s; ctrl-D ends")
        _converse(engine, sampling, args.system, _adapters(engine))
    finally:
        engine.close()
    return 0


def _title(engine: "Engine") -> str:
    adapters = [] if engine.adapters is None else [info.name for info in engine.adapters.list()]
    return " + ".join([engine.model.name, *adapters])


def _sampling(engine: "Engine", args: argparse.Namespace) -> "SamplingParams":
    from cadenza.decoding.request import SamplingParams

    names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
    asked = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return SamplingParams(**{**engine.model.sampling_defaults, **asked})


def _adapters(engine: "Engine") -> "AdapterSet | None":
    """All that were asked for; held to the end."""
    if engine.adapters is None:
        return None
    return engine.adapters.acquire([(info.name, 1.0) for info in engine.adapters.list()]).result()


def _converse(
    engine: "Engine", sampling: "SamplingParams", system: str | None, adapters: "AdapterSet | None"
) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        question = {"role": "user", "content": line}
        try:
            answer = _answer(engine, sampling, [*messages, question], adapters)
        except RequestError as error:  # such as a conversation that has outgrown the context
            _say(f"cadenza: {error}")
            continue
        messages += [question, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    """The user's next line; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            _say("\nctrl-D ends")


def _answer(
    engine: "Engine",
    sampling: "SamplingParams",
    messages: list[dict[str, Any]],
    adapters: "AdapterSet | None",
) -> str:
    from cadenza.decoding.completion import prompt_token_ids
    from cadenza.decoding.request import Delta, GenerationRequest

    own = None if adapters is None else adapters.tokenizer
    token_ids = prompt_token_ids(own or engine.tokenizer, messages)
    request = GenerationRequest(
        request_id=uuid.uuid4().hex, prompt_token_ids=token_ids, sampling=sampling, adapters=adapters
    )
    stream = engine.submit(request)
    said = ""
    try:
        for event in stream:
            if isinstance(event, Delta):
                said += event.text
                print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        stream.abort()
    print()
    return said


def _say(text: str) -> None:
    """To the person, not into what a pipe collects."""
    print(text, file=sys.stderr, flush=True)
