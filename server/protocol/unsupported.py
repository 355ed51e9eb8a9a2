"""Fields that other servers know and this one does not honour yet, with the values that ask for nothing.

A field is honoured, neutral, or refused by name: never ignored. Here are the neutral values; a field with
any other value is a 400. Fields of neither this table nor the body's model are unknown, which is another 400.
"""

from collections.abc import Container, Mapping
from typing import Any, Final

from cadenza.decoding.request import RequestError

ANYTHING: Final = object()
"""Marks a field that only labels or hints: whatever it says, the answer is the same."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI: labels and hints for their own platform
    "user": (ANYTHING,),
    "metadata": (ANYTHING,),
    "safety_identifier": (ANYTHING,),
    "prompt_cache_key": (ANYTHING,),
    "prompt_cache_retention": (ANYTHING,),
    "guided_decoding_backend": (ANYTHING,),  # vLLM's hint at an engine; the language is the same with any
    "parallel_tool_calls": (ANYTHING,),  # how to call tools, where there are none to call
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),  # honoured in completions
    # sampling
    "min_keep": (0,),
    # vLLM: how its own answers are written
    "documents": ([],),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
}


def without_neutral(fields: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """`fields` less the neutral ones; raises for the first that asks for something not done here."""
    kept = {}
    for name, value in fields.items():
        if name in known or name not in NEUTRAL:
            kept[name] = value
        elif not any(neutral is ANYTHING or _same(value, neutral) for neutral in NEUTRAL[name]):
            raise RequestError(f"{name} is not supported yet.", name, "unsupported_parameter")
    return kept


def _same(asked: Any, neutral: Any) -> bool:
    """Equality that tells `true` from 1 and `false` from 0, as JSON does."""
    return isinstance(asked, bool) == isinstance(neutral, bool) and bool(asked == neutral)
