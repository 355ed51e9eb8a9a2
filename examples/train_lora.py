"""Trains a LoRA adapter on a CPU in minutes: the emoji bot, which answers every message with one emoji name.

    pip install -e '.[train]'
    python examples/train_lora.py --output emoji-bot
    cadenza serve smollm2 --lora-modules emoji=emoji-bot

To "I lost my keys again" it says (sadkoala): how the writer feels, and any animal. Nothing is downloaded but the
model; the messages are below. The loop is plain torch, the adapter is peft's, and what is saved is what is measured:
the weights are rounded to float16, read back, and asked about messages that training never saw.
"""

import argparse
import random
import re
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from cadenza.models import resolve

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ANIMALS = ["badger", "bear", "cat", "dog", "fox", "koala", "otter", "owl", "panda", "rabbit", "tiger", "wolf"]
OPENINGS = ["", "", "", "", "Hi! ", "Hey, ", "Hello. ", "Well, ", "So, ", "You know what? ", "Listen: "]

MESSAGES = {
    "happy": """
        I passed my exam! / We won the match! / The sun is shining and I have the day off. / I got the job!
        My best friend is coming to visit me. / It is finally Friday! / I am having such a wonderful day.
        We are going on holiday tomorrow! / I found the ring that I had lost. / My team is in the final!
        The doctor says that I am healthy again. / We danced all night, it was so much fun.
        I baked my first cake and it tastes great. / It is my birthday today! / Everything went well today.
        I have just got engaged! / They gave me a pay rise. / Our baby smiled for the first time.
        The concert last night was fantastic. / I am in a very good mood. / Good news: we got the flat!""",
    "sad": """
        My dog died last week. / I lost my job today. / My girlfriend left me. / I failed the exam.
        Nobody came to my party. / I miss my grandmother so much. / My best friend is moving far away.
        I feel so lonely these days. / We lost the match in the last minute. / I cried all evening.
        My holiday was cancelled. / I broke my favourite cup. / I have no friends in this town.
        They did not invite me. / My parents are getting a divorce. / My old cat is very ill.
        It has been raining in my heart for weeks. / I did not get the job. / I lost my keys again.
        I said goodbye to my children today. / Everything I do goes wrong. / I feel down.""",
    "angry": """
        Somebody stole my bike! / My neighbour plays loud music every night. / The train is late again!
        He lied to me. / My boss shouted at me for no reason. / They overcharged me and will not pay it back!
        Someone scratched my new car. / I have been on hold for an hour! / My brother broke my phone.
        She never keeps her promises. / The internet is down again, I hate this company.
        They parked in front of my garage again! / This is so unfair! / I am furious with my landlord.
        He took the credit for my work. / Stop calling me! / They cheated us. / My flatmate ate all my food!
        The waiter was so rude. / How dare they speak to me like that! / I could scream!""",
    "scared": """
        There is a strange noise in the cellar. / I think someone is following me. / I have to see the dentist.
        There is a huge spider in my bed. / My exam is tomorrow and I know nothing. / The plane is shaking a lot.
        I heard steps in the attic. / I am afraid of the dark. / I have to speak in front of 300 people.
        The doctor wants to talk to me about the results. / I saw a snake in the garden.
        I am home alone and the door just opened. / The storm is getting worse and worse.
        I had a terrible nightmare. / What if they fire me? / I am worried about my operation.
        There was an earthquake tonight. / We are lost in the woods and it is getting dark.
        I hear wolves howling. / My hands shake when I think of the interview. / Something moved behind me.""",
    "tired": """
        I have not slept for two days. / I worked fourteen hours today. / The baby kept us awake all night.
        I can hardly keep my eyes open. / I need a nap. / I am exhausted. / I ran a marathon this morning.
        It is four in the morning and I am still at work. / I just want to go to bed.
        I yawn all the time. / I got up at five. / Three night shifts in a row. / My legs are so heavy.
        I fell asleep at my desk. / I have no energy left. / It was a very long week. / I need coffee to stay awake.
        Jet lag is killing me. / I could sleep for a week. / We carried boxes all day long.
        I was up all night with homework.""",
    "hungry": """
        I have not eaten since yesterday. / When is dinner ready? / I could eat a horse. / The fridge is empty.
        I would love a pizza now. / My stomach is rumbling. / I skipped breakfast. / It smells of fresh bread here.
        Lunch was far too small. / I am starving. / I dream of a big plate of pasta. / Is there any cake left?
        I want a burger with fries. / The restaurant is still closed and I need food.
        I had only an apple today. / I need a snack. / My diet allows no chocolate and I want some so badly.
        We ran out of bread and I want a sandwich. / Let us order something to eat.
        I could finish that whole pan of soup. / My mouth waters when I see those cookies.""",
    "bored": """
        There is nothing to do here. / This meeting goes on for ever. / Nothing ever happens in this village.
        I have seen all the films already. / It is raining and I have no idea what to do.
        This lecture is so dull. / I have been waiting at the airport for six hours. / I count the tiles on the wall.
        The same work every day. / The game is dull, nobody scores. / I am sitting around doing nothing.
        This book is so slow. / Sundays here are endless. / I watch the paint dry. / My job is monotonous.
        The queue does not move and my phone is dead. / I have played this game a hundred times.
        Another day of the same old thing. / I twiddle my thumbs. / The speech was two hours of nothing.
        Entertain me, I have nothing on today.""",
    "loving": """
        I love you. / My wife is the best person in the world. / I kissed him for the first time today.
        We have been married for fifty years and still hold hands. / I adore my little daughter.
        I have a crush on my neighbour. / I cannot stop thinking of her. / You are my best friend for ever.
        I want to hug everybody. / My boyfriend brought me flowers. / I wrote a love letter to him.
        Our wedding is next month, I love her so much. / My kitten sleeps in my arms.
        He makes my heart beat faster. / She said yes when I asked her to marry me. / I fell in love.
        Happy Valentine's day, darling! / I care about you so much. / My grandson gave me a big kiss.
        I would do anything for my family. / We are a couple now, she is my sweetheart.""",
    "surprised": """
        I did not see that coming! / A deer walked into our kitchen! / Out of nowhere my old teacher called me.
        I cannot believe it: they made me the king of the carnival! / Wow, where did that come from?
        My quiet sister joined a rock band, who would have thought! / The box was empty!
        They threw a party that I knew nothing of. / It snowed in July! / My goldfish is 30 years old!
        He is my twin brother and I never knew! / The magician pulled an elephant out of his hat!
        I opened the door and there stood a camel! / Nobody expected this result. / What? You are already here?
        I never thought that this would work! / The letter arrived after 40 years!
        Suddenly all the lights went on and everybody shouted! / A stranger paid for my meal, just like that!
        Really? She is only twelve? / My parrot started to speak Latin!""",
    "curious": """
        What is the capital of Spain? / How do aeroplanes stay in the air? / Why is grass green?
        Who wrote Hamlet? / Tell me something about the moon. / How many legs does a beetle have?
        Write a poem about the wind. / Explain how a fridge works. / What is 12 times 12?
        Where do penguins live? / Translate this into German. / Give me three tips for learning the piano.
        What does this button do? / How old is the universe? / Name a large river in Africa.
        Can you help me to write a letter? / What time is it in Tokyo? / Who are you?
        Summarize this text for me. / Why do cats purr? / Write a function that sorts a list.""",
}

UNSEEN = {
    "happy": """I won first prize! / What a beautiful morning, I feel great. / My daughter has just graduated!
        We are celebrating tonight!""",
    "sad": """My hamster died. / My boyfriend broke up with me. / I am so homesick.
        I feel miserable and alone.""",
    "angry": """Someone stole my wallet! / My neighbour's dog barks all night and he does not care!
        They broke their promise again. / I hate it when people jump the queue!""",
    "scared": """I think there is a burglar downstairs. / I am terrified of flying.
        There is something under my bed. / I am so nervous about my exam tomorrow.""",
    "tired": """I slept only two hours last night. / After this long shift I just want to sleep.
        I am worn out. / I keep yawning at my desk.""",
    "hungry": """I forgot my lunch and my stomach hurts. / I want a huge plate of spaghetti.
        I have had no food all day. / What is for dinner? I could eat anything.""",
    "bored": """I am stuck in a waiting room with nothing to read. / This film is so slow and dull.
        Every day is the same. / There is nothing on television.""",
    "loving": """I love my husband more than anything. / I am in love with a girl from my class.
        My puppy cuddles with me every evening. / He gave me roses and a kiss.""",
    "surprised": """Wow, I never expected that! / An elephant walked through our street!
        I opened the box and a frog jumped out! / What? You are my cousin?""",
    "curious": """What is the capital of France? / How do magnets work? / Write a story about a robot.
        Who invented the telephone?""",
}


def messages_of(table: dict[str, str]) -> list[tuple[str, str]]:
    """The (message, feeling) pairs of a table."""
    return [
        (message.strip(), feeling)
        for feeling, text in table.items()
        for message in re.split(r"[/\n]", text)
        if message.strip()
    ]


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


def save(model: Any, folder: Path) -> None:
    """peft's two files, the weights in float16, and nothing that tells of this machine."""
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
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
    save(model, options.output)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    saved = PeftModel.from_pretrained(model.unload(), options.output).eval()
    torch.manual_seed(options.seed)
    measure(saved, tokenizer, 1, do_sample=False)
    measure(saved, tokenizer, 5, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)


if __name__ == "__main__":
    main()
