"""What adapters cost: many of them in one batch, a cold one's first token, and peft beside it.

    python benchmarks/lora.py                              # everything, about five minutes on two cores
    python benchmarks/lora.py --only throughput --concurrency 16 --rounds 5 --json

throughput    tokens per second of the engine with 1, 8 and 64 different adapters of rank 16 in the batch (or as many as
              there are requests), over the same engine without; of all linear layers, and of q_proj and v_proj only
first token   of one request alone: without an adapter; with one that lies on the device; with one that is only on disk
              and has never been loaded, from asking the library to load it
peft          the same greedy requests, each with its own adapter, one after the other: set_adapter, then
              transformers' generate; against the engine, which has them all in one batch

Adapters are random and written to a temporary folder in peft's format. What is compared is measured in turn; figures
are medians over rounds. The engine and peft run in a process of their own each, as threads that compute in turn within
one process wait for each other in a slower way. Their answers are compared, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cadenza.models import resolve

Task = dict[str, Any]
Row = dict[str, Any]
RANK, MAX_ADAPTERS = 16, 64
KINDS = {
    "all linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "q, v": ("q_proj", "v_proj"),
}
TEXT = "Write down, in your own words, what happened to ship number"


def write_adapters(folder: Path, kind: str, count: int, config: Any) -> None:
    """folder/0 … folder/count-1, of weights that change answers without making noise of them."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    shapes = {
        "q_proj": ("self_attn", hidden, queries),
        "k_proj": ("self_attn", hidden, keys),
        "v_proj": ("self_attn", hidden, keys),
        "o_proj": ("self_attn", queries, hidden),
        "gate_proj": ("mlp", hidden, inner),
        "up_proj": ("mlp", hidden, inner),
        "down_proj": ("mlp", inner, hidden),
    }
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    for number in range(count):
        noise, tensors = torch.Generator().manual_seed(number), {}
        for layer in range(config.num_hidden_layers):
            for name in KINDS[kind]:
                parent, width, height = shapes[name]
                key = f"base_model.model.model.layers.{layer}.{parent}.{name}.lora"
                tensors[f"{key}_A.weight"] = torch.randn(RANK, width, generator=noise) * width**-0.5
                tensors[f"{key}_B.weight"] = torch.randn(height, RANK, generator=noise) * 0.01
        own = folder / str(number)
        own.mkdir(parents=True)
        config_text = json.dumps({**settings, "target_modules": list(KINDS[kind])})
        (own / "adapter_config.json").write_text(config_text)
        save_file(tensors, own / "adapter_model.safetensors")


def requests_of(count: int, num_adapters: int, num_tokens: int) -> list[dict[str, Any]]:
    """Adapters take turns; without any, the base."""
    return [
        {
            "text": f"{TEXT} {number}.",
            "adapter": str(number % num_adapters) if num_adapters else None,
            "num_tokens": num_tokens,
        }
        for number in range(count)
    ]


# The other processes: a task per line in, an answer per line out.


class EngineChild:
    def __init__(self, model: str, folder: str) -> None:
        from cadenza.decoding import Engine, EngineConfig
        from cadenza.models import LoadConfig

        config = EngineConfig(
            kv_cache_memory_gb=1.0,
            max_num_seqs=64,
            enable_lora=True,
            max_loras=MAX_ADAPTERS,
            max_lora_rank=RANK,
            max_cpu_loras=MAX_ADAPTERS + 1,
            enable_prefix_caching=False,
        )
        self._folder = folder
        self._engine = Engine.load(model, LoadConfig(dtype="float32", device="cpu"), config)
        assert self._engine.adapters is not None
        self._library = self._engine.adapters

    def load(self, task: Task) -> Row:
        """Those there are under their numbers."""
        paths = sorted(Path(self._folder).iterdir(), key=lambda path: int(path.name))
        start = time.perf_counter()
        for future in [self._library.load(path.name, str(path)) for path in paths]:
            future.result()
        return {"seconds": time.perf_counter() - start}

    def generate(self, task: Task) -> Row:
        from cadenza.decoding.completion import collect

        start = time.perf_counter()
        streams = [self._submit(fields) for fields in task["requests"]]
        answers = [collect(stream, 1).choices[0].token_ids for stream in streams]
        return {"seconds": time.perf_counter() - start, "token_ids": answers}

    def first_token(self, task: Task) -> Row:
        """load: an adapter's folder, which is loaded first, and unloaded when the token is there."""
        from cadenza.decoding import Delta

        fields = task["request"]
        start = time.perf_counter()
        if "load" in task:
            self._library.load(fields["adapter"], task["load"]).result()
        stream = self._submit(fields)
        next(event for event in stream if isinstance(event, Delta) and event.token_ids)
        seconds = time.perf_counter() - start
        for _ in stream:
            pass
        if "load" in task:
            self._library.unload(fields["adapter"])
        return {"seconds": seconds}

    def _submit(self, fields: dict[str, Any]) -> Any:
        from cadenza.decoding import GenerationRequest, SamplingParams

        adapters = None
        if fields["adapter"] is not None:
            adapters = self._library.acquire([(fields["adapter"], 1.0)]).result()
        sampling = SamplingParams(
            max_tokens=fields["num_tokens"],
            min_tokens=fields["num_tokens"],
            temperature=0.0,
        )
        try:
            return self._engine.submit(
                GenerationRequest(
                    request_id="",
                    prompt_token_ids=tuple(self._engine.tokenizer.encode(fields["text"])),
                    sampling=sampling,
                    adapters=adapters,
                )
            )
        finally:
            if adapters is not None:
                adapters.release()


class PeftChild:
    def __init__(self, model: str, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._model: Any = None

    def load(self, task: Task) -> Row:
        from peft import PeftModel

        for number in range(task["count"]):
            path = str(Path(self._folder) / str(number))
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, path, adapter_name="0").eval()
            else:
                self._model.load_adapter(path, adapter_name=str(number))
        return {}

    def generate(self, task: Task) -> Row:
        import torch

        start = time.perf_counter()
        answers = []
        for fields in task["requests"]:
            self._model.set_adapter(fields["adapter"])
            prompt = self._tokenizer(fields["text"], return_tensors="pt")
            length = fields["num_tokens"]
            with torch.inference_mode():
                output = self._model.generate(
                    **prompt, do_sample=False, min_new_tokens=length, max_new_tokens=length
                )
            answers.append(output[0, prompt["input_ids"].shape[1] :].tolist())
        return {"seconds": time.perf_counter() - start, "token_ids": answers}


CHILDREN: dict[str, Callable[[str, str], Any]] = {"engine": EngineChild, "peft": PeftChild}


class Child:
    """A process that does tasks; ended with its input."""

    def __init__(self, name: str, model: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--child", name, "--model", model, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, verb: str, **task: Any) -> Row:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"verb": verb, **task}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process has died")
        answer: Row = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def child_main(name: str, model: str, folder: str) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    child = CHILDREN[name](model, folder)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(getattr(child, task["verb"])(task)), file=out, flush=True)


# The parts. Each returns rows: what, how often as fast or how long, and the spread.


def throughput(engine: Child, kind: str, options: argparse.Namespace) -> list[Row]:
    rows = []
    for concurrency in options.concurrency:
        counts = sorted({min(count, concurrency) for count in (0, 1, 8, MAX_ADAPTERS)})
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for number in range(options.rounds + 1):
            for count in counts if number % 2 else counts[::-1]:
                requests = requests_of(concurrency, count, options.tokens)
                seconds = engine("generate", requests=requests)["seconds"]
                if number:  # the first round warms up
                    speeds[count].append(concurrency * options.tokens / seconds)
        for count in counts:
            ratios = [own / base for own, base in zip(speeds[count], speeds[0], strict=True)]
            number_of = {0: "no adapters", 1: "1 adapter"}.get(count, f"{count} adapters")
            what = f"{number_of} of {kind}, {concurrency} at once"
            rows.append(_row(what, "tokens/s", speeds[count], over="the base alone", ratios=ratios))
    return rows


def first_token(engine: Child, kind: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    seconds: dict[str, list[float]] = {"base": [], "warm": [], "cold": []}
    for number in range(4 * options.rounds + 1):
        request = {"text": f"{TEXT} {number}.", "num_tokens": 2}
        answers = {
            "base": engine("first_token", request={**request, "adapter": None}),
            "warm": engine("first_token", request={**request, "adapter": "0"}),
            "cold": engine(
                "first_token",
                request={**request, "adapter": f"cold-{number}"},
                load=str(folder / f"cold-{number}"),
            ),
        }
        for name, answer in answers.items() if number else ():
            seconds[name].append(answer["seconds"])
    return [
        _row(
            f"first token, {name}" + ("" if name == "base" else f" adapter of {kind}"),
            "ms",
            [1000 * each for each in own],
            over="the base",
            ratios=[each / base for each, base in zip(own, seconds["base"], strict=True)],
        )
        for name, own in seconds.items()
    ]


def against_peft(engine: Child, peft: Child, kind: str, options: argparse.Namespace) -> list[Row]:
    count = 8
    peft("load", count=count)
    requests = requests_of(count, count, options.tokens)
    speeds: dict[str, list[float]] = {"engine": [], "peft": []}
    num_equal = num_answers = 0
    for number in range(options.rounds + 1):
        answers = {
            "engine": engine("generate", requests=requests),
            "peft": peft("generate", requests=requests),
        }
        for name, answer in answers.items() if number else ():
            speeds[name].append(count * options.tokens / answer["seconds"])
        pairs = list(zip(*(answer["token_ids"] for answer in answers.values()), strict=True))
        num_equal, num_answers = num_equal + sum(a == b for a, b in pairs), num_answers + len(pairs)
    ratios = [own / other for own, other in zip(speeds["engine"], speeds["peft"], strict=True)]
    what = f"{count} requests, each its own adapter of {kind}"
    note = f"{num_equal} of {num_answers} answers equal"
    return [
        _row(f"{what}: peft, in turn", "tokens/s", speeds["peft"], over="peft", ratios=[1.0]),
        _row(f"{what}: together", "tokens/s", speeds["engine"], over="peft", ratios=ratios, note=note),
    ]


def _row(
    what: str, unit: str, values: Sequence[float], *, over: str, ratios: Sequence[float], note: str = ""
) -> Row:
    return {
        "what": what,
        "unit": unit,
        "median": statistics.median(values),
        "over": over,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "note": note,
    }


PARTS = ("throughput", "first token", "peft")


def measure(kind: str, options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    from transformers import AutoConfig

    model = str(resolve(options.model))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_cold = 4 * options.rounds + 1
        write_adapters(folder / "all", kind, MAX_ADAPTERS + num_cold, AutoConfig.from_pretrained(model))
        (folder / "cold").mkdir()
        for number in range(num_cold):
            (folder / "all" / str(MAX_ADAPTERS + number)).rename(folder / "cold" / f"cold-{number}")
        children = [Child("engine", model, folder / "all")]
        try:
            engine = children[0]
            engine("load")
            if "throughput" in options.only:
                say(f"throughput, {kind} …")
                rows += throughput(engine, kind, options)
            if "first token" in options.only:
                say(f"first token, {kind} …")
                rows += first_token(engine, kind, folder / "cold", options)
            if "peft" in options.only:
                say(f"peft, {kind} …")
                children.append(Child("peft", model, folder / "all"))
                rows += against_peft(engine, children[1], kind, options)
        finally:
            for child in children:
                child.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each request")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", action="store_true", help="rows as JSON in place of a table")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_main(options.child, options.model, options.folder)
        return
    console = Console(width=130, stderr=options.json)
    rows = [
        row
        for kind in options.kinds
        for row in measure(kind, options, lambda text: console.print(text, style="dim"))
    ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    out = Table("", "median", "", "ratio", "lowest", "highest", "over", "")
    for row in rows:
        figures = (f"{row[name]:.2f}" for name in ("ratio", "lowest", "highest"))
        out.add_row(row["what"], f"{row['median']:.1f}", row["unit"], *figures, row["over"], row["note"])
    console.print(out)


if __name__ == "__main__":
    main()
