"""The engine from Python, without a server. Usage: python examples/python_api.py"""

from cadenza.decoding import Engine

with Engine.load("smollm2") as engine:
    question = {"role": "user", "content": "What is the capital of France?"}
    for piece in engine.stream([question], temperature=0):
        print(piece, end="", flush=True)
    answer = engine.generate("Once upon a time", max_tokens=20, n=2, seed=42, min_p=0.1)
    print(*(f"\n- Once upon a time{choice.text}" for choice in answer.choices))
