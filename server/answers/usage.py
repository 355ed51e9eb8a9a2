"""How many tokens an answer cost: each prompt once, the tokens of all choices."""

from dataclasses import dataclass
from typing import Any

from cadenza.decoding.request import Delta, Event, PromptDone, Unsent


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0

    def count(self, event: Event) -> None:
        match event:
            case PromptDone():
                self.prompt_tokens += event.num_prompt_tokens
                self.cached_tokens += event.num_cached_tokens
            case Delta():
                self.completion_tokens += len(event.token_ids)
                self.forced_tokens += event.num_forced_tokens
            case Unsent():
                self.completion_tokens += event.num_tokens
                self.forced_tokens += event.num_forced_tokens

    def wire(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
                "forced_tokens": self.forced_tokens,
            },
        }
