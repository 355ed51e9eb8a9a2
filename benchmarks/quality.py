"""What each precision costs in quality, against the same model in float32, through the product's own engine.

    python benchmarks/quality.py [--model smollm2] [--precisions float32 int8 int4-32 …] [--json]

Perplexity and Kullback-Leibler divergence: a text in windows of 512 tokens that do not overlap, each a prompt of its
own of which nothing but the first token goes unscored; logits are those that the engine's model runner gives, with
prepared operators and the paged KV cache. Agreement: how often the most likely token is float32's, given the same
text; and how many tokens a greedy answer to a chat prompt has in common with float32's before it goes its own way.
A precision whose library is not installed is named as skipped.
"""

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, SamplingParams
from cadenza.decoding.completion import collect, prompt_token_ids
from cadenza.models import LoadConfig, ModelError

TEXT = Path(__file__).parent.parent / "tests" / "data" / "precision" / "text.txt"
WINDOW = 512
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"quantization": "int8"},
    "int4-32": {"quantization": "int4", "quantization_group_size": 32},
    "int4-64": {"quantization": "int4", "quantization_group_size": 64},
    "int4-128": {"quantization": "int4", "quantization_group_size": 128},
    "nf4": {"quantization": "nf4"},
    "fp8": {"quantization": "fp8"},
    "llm-int8": {"quantization": "llm-int8"},
}
QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    "Write a haiku about the sea.",
    "Name three uses of salt.",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Tell me a short story about a fox.",
    "What is 12 times 12?",
    "List the days of the week.",
    "Describe a bicycle to someone who has never seen one.",
    "What causes earthquakes?",
    "Give me a tip for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "What is a prime number?",
    "Write a polite email that declines an invitation.",
    "How does a refrigerator work?",
    "What should I pack for a trip to the mountains?",
    "Summarize the plot of Cinderella.",
    "What is the difference between weather and climate?",
)


@dataclass
class Quality:
    precision: str
    weight_bytes: int
    """Of what the engine loaded."""
    perplexity: float
    kl_mean: float
    """Of float32's distribution from this one, nats per token."""
    kl_99: float
    """Its 99th percentile."""
    top1: float
    """Share of positions whose most likely token is float32's."""
    common_tokens: float
    """Mean number of tokens that greedy answers begin with in common with float32's."""
    answer_tokens: float
    """Mean length of float32's answers: the most that `common_tokens` can be."""


def windows(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]


def request(name: str, ids: Sequence[int], sampling: SamplingParams) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(ids), sampling=sampling)


def log_probabilities(engine: Engine, ids: list[int]) -> Iterator[Tensor]:
    """[tokens - 1, V] float32 for each window: of the token that follows."""
    seen: list[Tensor] = []
    runner = engine._core._runner

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = runner(*args, **kwargs)
        seen.extend(output.logits[first : first + count] for first, count in output.prompt_rows.values())
        return output

    engine._core._runner = watched  # type: ignore[assignment]
    try:
        for number, window in enumerate(windows(ids)):
            sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
            stream = engine.submit(request(f"window-{number}", window, sampling))
            prompt = collect(stream, 1).prompt
            logprobs = torch.log_softmax(torch.cat(seen)[: len(window) - 1].float(), -1)
            seen.clear()
            assert prompt is not None
            assert prompt.logprobs is not None
            told = [entry.logprob for entry in prompt.logprobs if entry is not None]
            own = logprobs.gather(1, torch.tensor(window[1:])[:, None])[:, 0]
            torch.testing.assert_close(own, torch.tensor(told), atol=1e-3, rtol=1e-3)  # what clients are told
            yield logprobs
    finally:
        engine._core._runner = runner


def answers(engine: Engine, num_tokens: int) -> list[list[int]]:
    """Greedy, all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    streams = []
    for number, question in enumerate(QUESTIONS):
        ids = prompt_token_ids(engine.tokenizer, [{"role": "user", "content": question}])
        streams.append(engine.submit(request(f"answer-{number}", ids, sampling)))
    return [collect(stream, 1).choices[0].token_ids for stream in streams]


def common(first: list[int], second: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


class Reference:
    """float32's distributions, in a file, its answers, and what it is measured at."""

    def __init__(self, engine: Engine, ids: list[int], num_tokens: int, file: Path) -> None:
        vocabulary = int(engine.model.config.vocab_size)
        rows = sum(len(window) - 1 for window in windows(ids))
        self.logprobs = np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, vocabulary))
        start = 0
        losses = []
        for window, part in zip(windows(ids), log_probabilities(engine, ids), strict=True):
            self.logprobs[start : start + len(part)] = part.numpy()
            start += len(part)
            losses.append(loss(part, window))
        self.answers = answers(engine, num_tokens)
        self.answer_tokens = statistics.mean(len(answer) for answer in self.answers)
        perplexity = float(torch.cat(losses).mean().exp())
        self.quality = Quality(
            "float32",
            engine.model.weight_bytes,
            perplexity,
            0.0,
            0.0,
            1.0,
            self.answer_tokens,
            self.answer_tokens,
        )


def loss(logprobs: Tensor, window: list[int]) -> Tensor:
    """[tokens - 1] float64, nats."""
    return -logprobs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].double()


def measure(precision: str, engine: Engine, ids: list[int], num_tokens: int, reference: Reference) -> Quality:
    losses, divergences, equal, start = [], [], [], 0
    for window, own in zip(windows(ids), log_probabilities(engine, ids), strict=True):
        theirs = torch.from_numpy(np.array(reference.logprobs[start : start + len(own)]))
        start += len(own)
        losses.append(loss(own, window))
        divergences.append(((theirs - own) * theirs.exp()).double().sum(1))
        equal.append(own.argmax(1) == theirs.argmax(1))
    kl = torch.cat(divergences)
    shares = [common(*pair) for pair in zip(reference.answers, answers(engine, num_tokens), strict=True)]
    return Quality(
        precision=precision,
        weight_bytes=engine.model.weight_bytes,
        perplexity=float(torch.cat(losses).mean().exp()),
        kl_mean=float(kl.mean()),
        kl_99=float(kl.quantile(0.99)),
        top1=float(torch.cat(equal).float().mean()),
        common_tokens=statistics.mean(shares),
        answer_tokens=reference.answer_tokens,
    )


def load(model: str, precision: str) -> Engine:
    config = EngineConfig(kv_cache_memory_gb=0.5, enable_prefix_caching=False)
    return Engine.load(model, LoadConfig(**{"dtype": "float32"} | PRECISIONS[precision]), config)


def run(options: argparse.Namespace) -> Iterator[Quality | str]:
    """One by one: what was measured, or a line that says why not."""
    with tempfile.TemporaryDirectory() as scratch:
        with load(options.model, "float32") as engine:
            ids = list(engine.tokenizer.encode(options.text.read_text(encoding="utf-8")))
            reference = Reference(engine, ids, options.max_tokens, Path(scratch) / "logprobs")
        yield reference.quality
        for precision in options.precisions:
            if precision == "float32":
                continue
            gc.collect()
            try:
                engine = load(options.model, precision)
            except ModelError as error:
                yield f"{precision} skipped: {error}"
                continue
            with engine:
                yield measure(precision, engine, ids, options.max_tokens, reference)
            del engine


def show(found: list[Quality]) -> None:
    base = found[0]
    table = Table(
        "precision", "weights MB", "perplexity", "change", "KL mean", "KL 99 %", "top-1", "tokens in common"
    )
    for row in found:
        table.add_row(
            row.precision,
            f"{row.weight_bytes / 1e6:.0f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / base.perplexity - 1:+.2%}",
            f"{row.kl_mean:.5f}",
            f"{row.kl_99:.4f}",
            f"{row.top1:.1%}",
            f"{row.common_tokens:.1f} of {row.answer_tokens:.1f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each greedy answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found, skipped = [], []
    for outcome in run(options):
        if isinstance(outcome, str):
            skipped.append(outcome)
        else:
            found.append(outcome)
            if not options.json:
                print(outcome, flush=True)
    if options.json:
        print(json.dumps({"results": [asdict(row) for row in found], "skipped": skipped}, indent=2))
        return
    show(found)
    print("\n".join(skipped))


if __name__ == "__main__":
    main()
