"""Golden answers of diverse beam search and contrastive search, which transformers 5 no longer contains.

transformers 4.49 is the definition. To make the files again, next to this one:

    python -m venv old && old/bin/pip install torch==2.13.0 transformers==4.49.0
    old/bin/python make_goldens.py CHECKPOINT

CHECKPOINT is the folder in which Cadenza keeps its converted copy of the default model: `load_model("smollm2").path`.
Each file holds, by model: `fingerprint` (logits of the first prompt), `eos_token_id` (the token that ends answers;
where it is not the model's own, it was chosen because it is frequent, so that hypotheses do end), `prompts` and
`cases`. `margin` of a contrastive case is the smallest distance between the two best candidates of any of its steps.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import ARCHITECTURES, fingerprint, tiny_model, tiny_prompts
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.generation import utils

HERE = Path(__file__).parent
STORY = (
    "The lighthouse keeper wrote down the weather every evening, first the wind, then the height of the waves, "
    "and last of all the colour of the sky, because his grandfather had told him that the colour is what sailors "
    "remember. In forty years he missed a single day. "
)
PROMPTS = [
    "The",
    "The capital of France is",
    "Why is the sky blue?\n",
    '"Where were you last night?" she asked.\n"',
    "Colours of the rainbow:\n1. Red\n2. Orange\n3.",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "',
    "<!DOCTYPE html>\n<html>\n  <head>\n    <title>",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "Good morning 🌞🌻! Today we celebrate 🎉 and",
    "床前明月光，疑是地上霜。",
    "Élève, où êtes-vous allé à Noël ? Größe, señor, œuvre:",
    "3.14159265358979323846264338327950288419716939937510",
    "\n\n        \t indented   text \n",
    "Once upon a time, in a village by the sea,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three most important inventions of the twentieth century are",
    "Water boils at 100 degrees. Ice melts at",
    STORY,
    STORY * 3,
]
CONTRASTIVE = [(0.6, 4), (0.4, 6), (0.8, 2)]
DIVERSE: list[dict[str, Any]] = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0, "early_stopping": True},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.8, "length_penalty": 2.0},
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 8, "num_beam_groups": 2, "diversity_penalty": 0.3, "length_penalty": 0.5},
    {
        "num_beams": 6,
        "num_beam_groups": 2,
        "diversity_penalty": 5.0,
        "early_stopping": "never",
        "length_penalty": 0.5,
    },
]


@torch.inference_mode()
def generate(model: Any, prompt: list[int], **options: Any) -> Any:
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **{"pad_token_id": 0, **options},
    )


def until_end(tokens: list[int], eos_token_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


def diverse(
    model: Any, prompt: list[int], eos: int | None, max_tokens: int, options: dict[str, Any], pad: int = 0
) -> Any:
    output = generate(
        model,
        prompt,
        eos_token_id=eos,
        max_new_tokens=max_tokens,
        num_return_sequences=options["num_beams"],
        pad_token_id=pad,
        **options,
    )
    answers = [until_end(row[len(prompt) :], eos) for row in output.sequences.tolist()]
    scores = [round(score, 6) for score in output.sequences_scores.tolist()]
    return {**options, "max_tokens": max_tokens, "token_ids": answers, "scores": scores}


def diverse_whatever_the_padding(*args: Any) -> Any:
    """A group that is done goes on by padding, which the other groups are penalized for as if it were its choice. Of
    three padding tokens, at least two are none that the answers would have had."""
    answers = [diverse(*args, pad=pad) for pad in (0, 1, 3)]
    return max(answers, key=answers.count)


def contrastive(model: Any, prompt: list[int], eos: int, max_tokens: int, alpha: float, top_k: int) -> Any:
    margins: list[float] = []
    ranking = utils._ranking_fast

    def watched(*args: Any) -> Any:
        context, following, probs = args[:3]
        context = context / context.norm(dim=2, keepdim=True)
        following = following / following.norm(dim=2, keepdim=True)
        similarity = (context @ following.transpose(1, 2)).squeeze(-1).max(dim=-1).values
        best = ((1 - alpha) * probs.view(-1) - alpha * similarity).topk(2).values
        margins.append(float(best[0] - best[1]))
        return ranking(*args)

    utils._ranking_fast = watched
    try:
        output = generate(
            model, prompt, eos_token_id=eos, max_new_tokens=max_tokens, penalty_alpha=alpha, top_k=top_k
        )
    finally:
        utils._ranking_fast = ranking
    tokens = output.sequences[0, len(prompt) :].tolist()
    return {
        "penalty_alpha": alpha,
        "top_k": top_k,
        "max_tokens": max_tokens,
        "token_ids": tokens,
        "margin": round(min(margins), 7),
    }


def frequent_token(model: Any, prompts: list[list[int]]) -> int:
    """A token that beams choose often after their first few."""
    counts: Counter[int] = Counter()
    for prompt in prompts:
        output = generate(
            model, prompt, eos_token_id=None, max_new_tokens=10, num_beams=8, num_return_sequences=8
        )
        for row in output.sequences.tolist():
            counts.update(set(row[len(prompt) + 3 :]))
    return max(counts, key=lambda token: (counts[token], token))


def default_model(checkpoint: Path) -> Any:
    """transformers 4 does not know `rope_parameters`, the name that transformers 5 gave the base of the rotation."""
    theta = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]["rope_theta"]
    options = {"torch_dtype": torch.float32, "attn_implementation": "eager", "rope_theta": theta}
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


def write(name: str, models: dict[str, Any]) -> None:
    recipe = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    }
    text = json.dumps({**recipe, "models": models}, ensure_ascii=False, separators=(",", ":"))
    (HERE / name).write_text(text.replace('{"prompt"', '\n{"prompt"').replace('},"', '},\n"') + "\n")


def cases_of(prompts: list[list[int]], answer: Any, options: list[Any]) -> list[Any]:
    """Every prompt with two of the options, so that each option meets many prompts."""
    chosen = [(i, option) for i in range(len(prompts)) for option in (i, i + len(options) // 2)]
    return [{"prompt": i, **answer(prompts[i], options[option % len(options)])} for i, option in chosen]


def main(checkpoint: Path) -> None:
    model = default_model(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    about = {"fingerprint": fingerprint(model, prompts[0]), "prompts": prompts}
    pairs = [(i, pair) for i in range(len(prompts)) for pair in CONTRASTIVE]
    searched = {
        "smollm2": {
            **about,
            "eos_token_id": 2,
            "cases": [{"prompt": i, **contrastive(model, prompts[i], 2, 24, *pair)} for i, pair in pairs],
        }
    }
    eos = frequent_token(model, prompts[:6])
    beams = {
        "smollm2": {
            **about,
            "eos_token_id": eos,
            "cases": cases_of(prompts, lambda prompt, o: diverse(model, prompt, eos, 10, o), DIVERSE),
        }
    }
    for name in ARCHITECTURES:
        model, prompts = tiny_model(name), tiny_prompts()
        eos = frequent_token(model, prompts)
        about = {"fingerprint": fingerprint(model, prompts[0]), "eos_token_id": eos, "prompts": prompts}
        chosen = [(i, option) for i in range(len(prompts)) for option in DIVERSE]
        cases = [
            {"prompt": i, **diverse_whatever_the_padding(model, prompts[i], eos, 10, option)}
            for i, option in chosen
        ]
        beams[name] = {**about, "cases": cases}
        pairs = [(i, pair) for i in range(len(prompts)) for pair in CONTRASTIVE]
        cases = [{"prompt": i, **contrastive(model, prompts[i], eos, 16, *pair)} for i, pair in pairs]
        searched[name] = {**about, "cases": cases}
    write("contrastive.json", searched)
    write("diverse_beams.json", beams)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
