"""Why a token: what the model thought of it, what the request's limits made of that, and who decided.

Computed from single rows of logits in float64, so that the numbers do not depend on the batch. Knows no requests, no
branches, and nothing of how a distribution is processed.
"""

from dataclasses import replace

from torch import Tensor
from torch.special import entr

from cadenza.decoding.request import Decision, TokenExplanation


def explain(
    raw: Tensor, final: Tensor, allowed: Tensor | None, token_id: int, decision: Decision
) -> TokenExplanation:
    """raw: the model's logits [V]; final: what the choice was made from [V], as logits, -inf where cut off;
    allowed: [V] bool, None where there is no constraint."""
    probabilities = raw.double().softmax(dim=-1)
    removed = 0.0 if allowed is None else probabilities[~allowed].sum().item()
    has_alternatives = allowed is None or int(allowed.sum()) > 1
    return TokenExplanation(
        token_id=token_id,
        raw_probability=probabilities[token_id].item(),
        final_probability=final.double().softmax(dim=-1)[token_id].item(),
        rank=int((raw > raw[token_id]).sum()) + 1,
        entropy=entr(probabilities).sum().item(),
        mass_removed=removed,
        decision=decision if has_alternatives else "forced",
    )


def decided(explanation: TokenExplanation, decision: Decision, *, budget_binds: bool) -> TokenExplanation:
    """The explanation of a token that is appended by `decision`.

    A token is forced also where the model was asked, but the mask had nothing else; if that is because the rest has
    to fit the budget, it closes. A run of forced tokens has no masks: everything else is what was removed.
    """
    if decision == "forced":
        others = 1.0 - explanation.raw_probability
        return replace(explanation, final_probability=1.0, mass_removed=others, decision="forced")
    if explanation.decision == "forced":
        decision = "closing" if budget_binds else "forced"
    return replace(explanation, decision=decision)
