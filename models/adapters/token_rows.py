"""Single tokens that were trained (`trainable_token_indices`): rows in place of those of the embedding's table, and of
the output layer's weight where the two are tied.

Rows beyond the table's end are new tokens; the table is then given whole. Knows no tokenizer.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cadenza.models.adapters.arrays import as_array, as_tensor
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.config import AdapterConfig
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.layout import Layout
from cadenza.models.adapters.locate import CONFIG
from cadenza.models.errors import ModelError

Rows = tuple[Tensor, Tensor]
_DELTA = "token_adapter.trainable_tokens_delta"
_ORIGINAL = "token_adapter.trainable_tokens_original"


def token_ids(groups: dict[str, Group], layout: Layout, config: AdapterConfig) -> dict[str, Sequence[int]]:
    """Which tokens the rows are, by the module that has them. Gives the output layer the embedding's rows, as peft does
    where the two are tied and it has none of its own."""
    found = {name: _ids(group, layout, config) for name, group in groups.items() if _DELTA in group.tensors}
    source, output, tokens = layout.input_embedding, layout.output_embedding, config.token_indices
    if layout.is_tied and output is not None and source in found:
        group = groups.setdefault(output, Group(output, output, layout.sites[output]))
        group.tensors.setdefault(_DELTA, groups[source].tensors[_DELTA])
        found[output] = found.get(output) or found[source]
    for name in tokens if isinstance(tokens, Mapping) else ():
        if not any(groups[module].trained_name.endswith(name) for module in found):
            raise ModelError(f"{CONFIG} has trainable_token_indices for {name}, the adapter no rows for them")
    if tokens is not None and not isinstance(tokens, Mapping) and source not in found:
        raise ModelError(f"{CONFIG} has trainable_token_indices, the adapter no rows for them in {source}")
    if missing := next((name for name, ids in found.items() if not ids), None):
        raise ModelError(f"{CONFIG} does not say which tokens the rows of {missing} are")
    return found


def _ids(group: Group, layout: Layout, config: AdapterConfig) -> Sequence[int]:
    """Empty if the configuration does not say. peft finds a module by the end of its name."""
    tokens = config.token_indices
    if not isinstance(tokens, Mapping):
        return tokens if tokens is not None and group.name == layout.input_embedding else ()
    found = [ids for name, ids in tokens.items() if group.trained_name.endswith(name)]
    return found[0] if found and all(ids == found[0] for ids in found) else ()


def take_rows(group: Group, ids: Mapping[str, Sequence[int]], dim: int) -> Rows | None:
    """(token ids, rows). ids: by module; dim: of a row."""
    rows = group.take(_DELTA)
    group.take(_ORIGINAL)
    if rows is None:
        return None
    tokens = ids[group.name]
    if tuple(rows.shape) != (len(tokens), dim):
        raise ModelError(
            f"{group.name}.{_DELTA} has shape {tuple(rows.shape)}, {CONFIG} and the model make it "
            f"({len(tokens)}, {dim})"
        )
    if any(rest.startswith("lora_") for rest in group.tensors):
        raise ModelError(f"{group.name} has trained tokens and is adapted, too; that is two meanings")
    if group.site.kind == "linear" and "bias" in group.site.shapes:
        raise ModelError(
            f"{group.name} has a bias, which peft drops where single tokens of a layer are trained"
        )
    return torch.tensor(tokens, dtype=torch.int64), rows


def extended(group: Group, weight: Tensor | None, rows: Rows, base: BaseWeights) -> Tensor | None:
    """The whole weight where rows are beyond its end; None where there are none."""
    shape = group.site.shapes["weight"]
    ids, num_rows = rows[0].numpy(), shape[0] if weight is None else weight.shape[0]
    new = sorted(int(token) for token in ids if token >= num_rows)
    if not new:
        return None
    if new != list(range(num_rows, num_rows + len(new))):
        raise ModelError(
            f"{group.name} has {num_rows} rows and the adapter none for each token up to {new[-1]}"
        )
    if weight is None:
        is_linear = group.site.kind == "linear"
        weight = base.linear(group.name) if is_linear else base.embedding(group.name, 0, num_rows)
    before, values = as_array(weight), as_array(rows[1])
    whole = np.empty((num_rows + len(new), shape[1]), before.dtype)
    whole[:num_rows] = before
    whole[ids] = values
    return as_tensor(whole)
