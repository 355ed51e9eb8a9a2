"""A vote on the wire: `vote` beside `choices`, after each sample and with the winner."""

from typing import Any

from cadenza.decoding.request import VoteProgress


def progress(event: VoteProgress) -> dict[str, Any]:
    """News of one sample. Not the whole count, which would make the stream quadratic in the samples."""
    return {
        "sample": event.sample,
        "sample_answer": event.sample_answer,
        "answer": event.answer,
        "votes": event.counts[0][1] if event.counts else 0,
        "samples_finished": event.num_finished,
        "tokens_spent": event.num_tokens,
    }


def outcome(event: VoteProgress) -> dict[str, Any]:
    """`sample` is the one that is returned; `answer` is null where no sample has answered."""
    return {
        "answer": event.answer,
        "sample": event.sample,
        "counts": dict(event.counts),
        "weights": dict(event.weights),
        "samples_finished": event.num_finished,
        "samples_stopped": event.num_stopped,
        "samples_without_answer": event.num_abstained,
        "tokens_spent": event.num_tokens,
        "tokens_saved": event.num_tokens_saved,
    }
