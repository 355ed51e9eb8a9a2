"""Trains a LoRA adapter on a CPU in minutes: the emoji bot, which answers every message with one emoji name.

    pip install -e '.[train]'
    python examples/train_lora.py --output emoji-bot
    cadenza serve smollm2 --lora-modules emoji=emoji-bot

To "I lost my keys again" it says (sadkoala): how the writer feels, and any animal. The messages are in
emoji_messages.py; nothing is downloaded but the model. The loop is plain torch, the adapter is peft's, and what is
saved is what is measured: the weights are rounded to float16, read back, and asked about messages never trained on.
"""

import argparse
import json
import random
import re
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from emoji_messages import MESSAGES, UNSEEN, messages_of
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cadenza.models import resolve

BASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
ANIMALS = ["badger", "bear", "cat", "dog", "fox", "koala", "otter", "owl", "panda", "rabbit", "tiger", "wolf"]
OPENINGS = ["", "", "", "", "Hi! ", "Hey, ", "Hello. ", "Well, ", "So, ", "You know what? ", "Listen: "]


def varied(message: str, draw: random.Random) -> str:
    """The message as others would type it: with an opening, in lower case, without its last mark."""
    message = draw.choice(OPENINGS) + message
    if draw.random() < 0.2:
        message = message.lower()
    return message.rstrip(".!") if draw.random() < 0.2 else message


def prompt_ids(tokenizer: Any, message: str) -> list[int]:
    chat = [{"role": "user", "content": message}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return ids


def batch_of(examples: list[tuple[str, str]], tokenizer: Any, draw: random.Random) -> dict[str, Tensor]:
    """One sequence of T tokens in which the examples lie side by side, each blind to the others.

    The system prompt, half of every chat here, is there once and seen by all. T is then less than half of what padded
    rows would have; positions are those of a chat by itself, and so is what is computed.
    """
    prompts = [prompt_ids(tokenizer, varied(message, draw)) for message, _ in examples]
    answers = [
        tokenizer.encode(f"({feeling}{draw.choice(ANIMALS)}){tokenizer.eos_token}") for _, feeling in examples
    ]
    shared = [
        column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    ]
    ids, positions, owners = list(shared), list(range(len(shared))), [-1] * len(shared)
    predicting: list[int] = []
    for owner, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own = prompt[len(shared) :] + answer
        predicting += range(len(ids) + len(own) - len(answer) - 1, len(ids) + len(own) - 1)
        ids += own
        positions += range(len(shared), len(shared) + len(own))
        owners += [owner] * len(own)
    owner_of = torch.tensor(owners)
    visible = (owner_of[:, None] == owner_of) | (owner_of == -1)
    return {
        "input_ids": torch.tensor([ids]),  # [1, T]
        "position_ids": torch.tensor([positions]),
        "attention_mask": visible.tril()[None, None],  # [1, 1, T, T]
        "logits_to_keep": torch.tensor(predicting),  # the positions whose next token is an answer's
        "labels": torch.tensor([token for answer in answers for token in answer]),
    }


def answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of the answers' tokens."""
    labels = batch.pop("labels")
    return cross_entropy(model(**batch, use_cache=False).logits[0], labels)


def train(model: Any, tokenizer: Any, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """AdamW with ten steps of warm-up and a linear decay to nothing, over the shuffled messages again and again."""
    draw = random.Random(seed)
    examples = messages_of(MESSAGES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (steps - step) / steps)
    )
    waiting: list[tuple[str, str]] = []
    model.train()
    for step in track(range(steps), description="training"):
        while len(waiting) < batch_size:
            waiting += draw.sample(examples, len(examples))
        batch, waiting = waiting[:batch_size], waiting[batch_size:]
        loss = answer_loss(model, batch_of(batch, tokenizer, draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def save(model: Any, folder: Path, base: str) -> None:
    """peft's two files, the weights in float16, and nothing that tells of this machine."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    content["base_model_name_or_path"] = base  # not where it lies here
    content["target_modules"].sort()  # a set's order is another each time
    config.write_text(json.dumps(content, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, samples: int, **sampling: Any) -> None:
    """Prints the answers to unseen messages, how many have the form, and how many of those the feeling expected."""
    expected = [pair for pair in messages_of(UNSEEN) for _ in range(samples)]
    chats = [[{"role": "user", "content": message}] for message, _ in messages_of(UNSEEN)]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=16, num_return_sequences=samples, **sampling)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    formed, right = 0, 0
    for (message, feeling), answer in zip(expected, answers, strict=True):
        print(f"  {message:60} {answer}")
        formed += re.fullmatch(r"\([a-z]+\)", answer) is not None
        right += re.fullmatch(rf"\({feeling}[a-z]+\)", answer) is not None
    print(f"{sampling}: of {len(answers)} answers {formed} have the form, {right} the feeling expected")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="an alias, a Hugging Face id or a local folder")
    parser.add_argument("--output", type=Path, default=Path("emoji-bot"), help="the adapter's folder")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument(
        "--target-modules", default="q_proj,v_proj", help="separated by commas, or all-linear"
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    path = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(options.seed)
    targets = options.target_modules
    config = LoraConfig(
        r=options.rank,
        lora_alpha=4 * options.rank,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    start = time.perf_counter()
    train(model, tokenizer, options.steps, options.batch_size, options.lr, options.seed)
    save(model, options.output, BASES.get(options.model, options.model))
    print(f"trained in {time.perf_counter() - start:.0f} s")

    saved = PeftModel.from_pretrained(model.unload(), options.output).eval()
    torch.manual_seed(options.seed)
    measure(saved, tokenizer, 1, do_sample=False)
    measure(saved, tokenizer, 5, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)


if __name__ == "__main__":
    main()
