"""Where low-rank changes lie: what is put into a slot, what is left of it, how much memory it takes."""

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

import cadenza.kernels.lora
from cadenza.decoding.adapters.tables import PlaneTables, slot_bytes
from cadenza.kernels.lora import PLANE, Uses, expand_, gather, is_large, shrink, shrink_large
from cadenza.models import LoadedModel
from cadenza.models.adapters.adapter import LowRank
from cadenza.models.adapters.layout import layout_of

CPU = torch.device("cpu")


def _change(rank: int, in_features: int, out_features: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, in_features, generator=generator),
        torch.randn(out_features, rank, generator=generator),
    )


def _uses(of_rows: dict[int, list[tuple[int, float]]], num_rows: int) -> Uses:
    """of_rows: (plane, scale) of each row's uses."""
    flat = [(row, plane, scale) for row, own in sorted(of_rows.items()) for plane, scale in own]
    counts = torch.tensor([len(own) for _, own in sorted(of_rows.items())])
    return Uses(
        rows=torch.tensor([row for row, _, _ in flat]),
        planes=torch.tensor([plane for _, plane, _ in flat]),
        scales=torch.tensor([scale for _, _, scale in flat]),
        users=torch.tensor(sorted(of_rows)),
        starts=counts.cumsum(0) - counts,
        num_rows=num_rows,
    )


@pytest.mark.parametrize("ranks", [(16, 1, 40), (33, 48, 5)])
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 40), (7, 3), (96, 24)])
def test_bags_are_the_products_in_float64(
    ranks: tuple[int, ...], in_features: int, out_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_slot = 3
    tables = PlaneTables(4, per_slot, in_features, out_features, torch.float32, CPU)
    changes = {}
    for seed, slot in enumerate((0, 2, 3)):  # each slot held another adapter, of a higher rank, before
        tables.put(slot, _change(per_slot * PLANE, in_features, out_features, 100 + seed))
        changes[slot] = _change(ranks[seed], in_features, out_features, seed)
        tables.put(slot, changes[slot])
    sets = [[], [(0, 1.0)], [(2, 0.5), (0, -2.0)], [(3, 1.0)], [], [(3, 0.25), (2, 1.0), (0, 3.0)]]
    of_rows = {
        row: [
            (slot * per_slot + plane, scale)
            for slot, scale in own
            for plane in range(-(-changes[slot].rank // PLANE))
        ]
        for row, own in enumerate(sets)
        if own
    }
    x = torch.randn(len(sets), in_features, generator=torch.Generator().manual_seed(9))
    before = torch.randn(len(sets), 2 * out_features)
    out = before.clone()
    view = out[:, :out_features]
    uses = _uses(of_rows, len(sets))
    expand_(view, shrink(gather(x, uses), tables.a, uses), tables.b, uses)
    expected = before.double()
    for row, own in enumerate(sets):
        for slot, scale in own:
            change = changes[slot]
            expected[row, :out_features] += scale * (
                change.b.double() @ (change.a.double() @ x[row].double())
            )
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(out[0], before[0])
    monkeypatch.setattr(cadenza.kernels.lora, "_AT_ONCE", 2 * in_features)
    assert is_large(uses, in_features)
    assert torch.equal(shrink_large(x, tables.a, uses), shrink(gather(x, uses), tables.a, uses))
    for row, own in of_rows.items():  # alone, to the last bit
        single = before[row : row + 1, :out_features].clone()
        alone = _uses({0: own}, 1)
        expand_(single, shrink(gather(x[row : row + 1], alone), tables.a, alone), tables.b, alone)
        assert torch.equal(single[0], out[row, :out_features])


def test_memory_comes_with_what_is_put_and_goes_with_what_is_cleared() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = resident()
    tables = PlaneTables(64, 4, 4096, 4096, torch.float32, CPU)  # 64 times 2 MiB
    promised = tables.a.nbytes + tables.b.nbytes
    empty = resident() - before
    change = _change(64, 4096, 4096, 1)
    for slot in range(64):
        tables.put(slot, change)
    full = resident() - before
    for slot in range(64):
        tables.clear(slot)
    cleared = resident() - before
    assert empty < promised / 8
    assert full > promised * 7 / 8
    assert cleared < promised / 8
    tables.put(3, change)
    a = tables.a.view(64, 4, 4096, PLANE)[3]
    assert torch.equal(a.permute(0, 2, 1).reshape(64, 4096), change.a)
    assert torch.equal(tables.b.view(64, 64, 4096)[3], change.b.T)


def test_what_a_plan_counts_is_what_full_slots_take(fresh_tiny_model: LoadedModel) -> None:
    model = dataclasses.replace(fresh_tiny_model)
    layout = layout_of(model.module)
    sites = [
        site
        for name, site in layout.sites.items()
        if site.kind == "linear" and name != layout.output_embedding
    ]
    assert len(sites) == 7 * model.config.num_hidden_layers
    tables = [PlaneTables(3, 2, site.in_features, site.out_features, torch.float32, CPU) for site in sites]
    taken = sum(each.a.nbytes + each.b.nbytes for each in tables)
    assert slot_bytes(layout, 3, 32, torch.float32) == taken
    assert slot_bytes(layout, 3, 17, torch.bfloat16) == taken // 2
