"""What each decoding strategy costs, beside what it replaces; medians of ratios over rounds taken in turn.

    python benchmarks/strategies.py                     # everything, about ten minutes on two cores
    python benchmarks/strategies.py --only beams --rounds 5

beams         one request of width 4, against transformers' generate(num_beams=4) on the same weights: tokens per second
samples       n = 16 over one prompt, against 16 requests that each compute the prompt, and 16 that find it cached
voting        self-consistency over 16 samples that stops when decided, against all 16: seconds and tokens,
              on problems where the model mostly agrees with itself and where it does not
speculation   `--speculative ngram`, on prompts whose answer repeats them, against none

transformers and every engine run in a process of their own, as threads that compute in turn within one process wait for
each other in a slower way. Answers that must be equal are compared.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from cadenza.models import resolve

Task = dict[str, Any]
Answer = dict[str, Any]
TOPICS = ["a lighthouse", "two brothers", "the first train", "an old map", "a storm at sea", "a violin"]
NOTES = (
    "The harbour master wrote down every ship that came in. On Monday the Aurora brought timber from the north and"
    " left with salt. On Tuesday the Petrel brought wool and two passengers who had paid in silver. On Wednesday nobody"
    " came, because the wind had turned and the sea was high. On Thursday the Aurora returned without her foremast. "
)
EXAMPLES = [(5, 2), (4, 3), (6, 8)]


# The other processes: a task per line in, an answer per line out.


class CadenzaChild:
    def __init__(self, folder: str, speculative: str | None) -> None:
        from cadenza.decoding import Engine, EngineConfig
        from cadenza.models import LoadConfig

        config = EngineConfig(kv_cache_memory_gb=1.0, speculative=speculative)
        self._engine = Engine.load(folder, LoadConfig(dtype="float32", device="cpu"), config)

    def __call__(self, task: Task) -> Answer:
        from cadenza.decoding.completion import collect

        requests = [self._request(number, fields) for number, fields in enumerate(task["requests"])]
        before = self._engine.stats().generation_tokens_total
        start = time.perf_counter()
        streams = [self._engine.submit(request) for request in requests]
        answers = [
            collect(stream, request.sampling.n) for stream, request in zip(streams, requests, strict=True)
        ]
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "num_generated": self._engine.stats().generation_tokens_total - before,
            "token_ids": [choice.token_ids for answer in answers for choice in answer.choices],
        }

    def _request(self, number: int, fields: dict[str, Any]) -> Any:
        from cadenza.decoding import GenerationRequest, SamplingParams
        from cadenza.decoding.completion import prompt_token_ids

        prompt = fields.get("messages") or [{"role": "user", "content": fields["text"]}]
        return GenerationRequest(
            request_id=str(number),
            prompt_token_ids=prompt_token_ids(self._engine.tokenizer, prompt),
            sampling=SamplingParams(**fields["sampling"]),
            strategy=_strategy(fields),
            cache_salt=fields.get("cache_salt", ""),
        )


def _strategy(fields: dict[str, Any]) -> Any:
    from cadenza.decoding.strategies.spec import BeamSearch
    from cadenza.decoding.voting.answer import LastNumber
    from cadenza.decoding.voting.spec import SelfConsistency

    if "beams" in fields:
        return BeamSearch(num_beams=fields["beams"])
    if "vote" in fields:
        return SelfConsistency(answer=LastNumber(), **fields["vote"])
    return None


class TransformersChild:
    def __init__(self, folder: str, _speculative: str | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, task: Task) -> Answer:
        import torch

        start = time.perf_counter()
        token_ids = []
        for fields in task["requests"]:
            messages = [{"role": "user", "content": fields["text"]}]
            prompt = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = fields["sampling"]["max_tokens"]
            with torch.inference_mode():
                output = self._model.generate(
                    **prompt,
                    num_beams=fields["beams"],
                    do_sample=False,
                    min_new_tokens=length,
                    max_new_tokens=length,
                )
            token_ids.append(output[0, prompt["input_ids"].shape[1] :].tolist())
        return {"seconds": time.perf_counter() - start, "token_ids": token_ids}


CHILDREN: dict[str, tuple[Callable[[str, str | None], Callable[[Task], Answer]], str | None]] = {
    "cadenza": (CadenzaChild, None),
    "cadenza, ngram": (CadenzaChild, "ngram"),
    "transformers": (TransformersChild, None),
}


class Child:
    """A process that answers tasks; ended with its input."""

    def __init__(self, name: str, folder: str) -> None:
        command = [sys.executable, __file__, "--child", name, "--model", folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, requests: list[dict[str, Any]]) -> Answer:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"requests": requests}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process has died")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def child_main(name: str, folder: str) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    make, speculative = CHILDREN[name]
    work = make(folder, speculative)
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=out, flush=True)


# The parts. Each yields (what, ours over theirs per round, what the figure is of, note).

Row = tuple[str, list[float], str, str]


def beams(children: dict[str, Child], rounds: int) -> Iterable[Row]:
    ours, theirs = children["cadenza"], children["transformers"]
    length, ratios, speeds, equal, total = 48, [], [], 0, 0
    for number in range(rounds + 1):
        text = f"Write a story about {TOPICS[number % len(TOPICS)]}."
        sampling = {"max_tokens": length, "min_tokens": length, "temperature": 0.0}
        request = {"text": text, "beams": 4, "sampling": sampling}
        own, other = ours([request]), theirs([request])
        if number:  # the first one warms both up
            ratios.append(other["seconds"] / own["seconds"])
            speeds.append((length / own["seconds"], length / other["seconds"]))
            equal += own["token_ids"] == other["token_ids"]
            total += 1
    mine, peer = (statistics.median(pair[at] for pair in speeds) for at in (0, 1))
    yield (
        "beam width 4 against transformers",
        ratios,
        "tokens/s",
        f"{mine:.1f} against {peer:.1f}; {equal} of {total} answers equal",
    )


def samples(children: dict[str, Child], rounds: int) -> Iterable[Row]:
    ours, length = children["cadenza"], 32
    apart: list[float] = []
    cached: list[float] = []
    for number in range(rounds + 1):
        text = f"{number}. {NOTES * 6}Tell the story of the week in your own words."
        sampling = {"max_tokens": length, "min_tokens": length, "temperature": 1.0, "seed": number}
        together = ours([{"text": text, "sampling": {**sampling, "n": 16}, "cache_salt": f"n{number}"}])
        salted = ours(
            [{"text": text, "sampling": sampling, "cache_salt": f"{number}-{at}"} for at in range(16)]
        )
        shared = ours([{"text": text, "sampling": sampling, "cache_salt": f"s{number}"} for _ in range(16)])
        if number:
            apart.append(salted["seconds"] / together["seconds"])
            cached.append(shared["seconds"] / together["seconds"])
    yield "n = 16 against 16 requests, each with its prompt", apart, "time", "a prompt of 450 tokens"
    yield "n = 16 against 16 requests, prompt cached", cached, "time", ""


def voting(children: dict[str, Child], rounds: int) -> Iterable[Row]:
    ours = children["cadenza"]
    for name, temperature in (("mostly agrees", 0.3), ("disagrees", 1.5)):
        rng = random.Random(5)
        seconds: list[float] = []
        tokens: list[float] = []
        for number in range(3 * rounds + 1):
            messages = [*_examples(), _problem(rng.randrange(2, 9), rng.randrange(2, 9))]
            sampling = {"max_tokens": 12, "temperature": temperature, "seed": number, "stop": ["\n"]}
            stopping = ours([{"messages": messages, "sampling": sampling, "vote": {"n": 16}}])
            every = {"n": 16, "stop_when_decided": False}
            whole = ours([{"messages": messages, "sampling": sampling, "vote": every}])
            if number:
                seconds.append(whole["seconds"] / stopping["seconds"])
                tokens.append(whole["num_generated"] / stopping["num_generated"])
        yield f"a vote that stops, of 16, where the model {name}", seconds, "time", ""
        yield f"a vote that stops, of 16, where the model {name}", tokens, "tokens", ""


def _problem(first: int, more: int) -> dict[str, str]:
    text = f"Kim has {first} hats and buys {more} more. How many hats does Kim have?"
    return {"role": "user", "content": text}


def _examples() -> Iterable[dict[str, str]]:
    for first, more in EXAMPLES:
        yield _problem(first, more)
        yield {"role": "assistant", "content": f"{first} + {more} = {first + more}"}


def speculation(children: dict[str, Child], rounds: int) -> Iterable[Row]:
    plain, guessing = children["cadenza"], children["cadenza, ngram"]
    tasks = {
        "copying": f"Repeat this text word for word, without a change:\n\n{NOTES}",
        "an edit": f"Write this text again, but call the Aurora the Swallow:\n\n{NOTES}",
        "a story": "Write a story about a lighthouse.",
    }
    for name, text in tasks.items():
        for concurrency in (1, 4, 16):
            ratios, equal = [], True
            for number in range(rounds + 1):
                sampling = {"max_tokens": 96, "temperature": 0.0}
                requests = [{"text": text + "\n" * at, "sampling": sampling} for at in range(concurrency)]
                with_it, without = guessing(requests), plain(requests)
                equal &= with_it["token_ids"] == without["token_ids"]
                if number:
                    ratios.append(without["seconds"] / with_it["seconds"])
            note = "answers equal" if equal else "ANSWERS DIFFER"
            yield f"n-gram speculation, {name}, {concurrency} at once", ratios, "time", note


PARTS: dict[str, Callable[[dict[str, Child], int], Iterable[Row]]] = {
    "beams": beams,
    "samples": samples,
    "voting": voting,
    "speculation": speculation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_main(options.child, options.model)
        return
    console = Console(width=120)
    folder = str(resolve(options.model))
    children = {name: Child(name, folder) for name in CHILDREN}
    out = Table("", "times as fast", "lowest", "highest", "of", "")
    try:
        for part in options.only:
            console.print(f"{part} …", style="dim")
            for what, ratios, of, note in PARTS[part](children, options.rounds):
                out.add_row(
                    what,
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f}",
                    f"{max(ratios):.2f}",
                    of,
                    note,
                )
    finally:
        for child in children.values():
            child.close()
    console.print(out)


if __name__ == "__main__":
    main()
