"""What is compiled before the first request: each kernel that the logits pipeline commonly launches."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.decoding.fused_logits import FusedLogitsPipeline
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Candidates
from cadenza.decoding.warm_up import _row, warm_up


def test_every_kernel_of_the_pipeline_is_launched(kernel_device, triton_interpreter, monkeypatch):
    if kernel_device.type != "cpu":
        pytest.skip("launches are watched in the interpreter")
    launched = []
    run = triton_interpreter._Launch.run

    def watched(self, *args, **kwargs):
        launched.append(self.function.__name__)
        run(self, *args, **kwargs)

    monkeypatch.setattr(triton_interpreter._Launch, "run", watched)
    pipeline = FusedLogitsPipeline(60, "raw_logprobs")
    warm_up(pipeline, 64, torch.float32, kernel_device)
    kernels = ("blocks", "choose", "scan", "pick", "copy", "scatter")
    assert set(launched) == {f"_{name}_kernel" for name in kernels}


@pytest.mark.parametrize("num_columns", [32000, 32001, 50257, 151936])
def test_nothing_that_is_commonly_asked_for_is_compiled_later(num_columns, triton_compiler):
    """Whatever the number of rows is, and also where rows of logits do not begin at multiples of 16."""
    pipeline = FusedLogitsPipeline(num_columns, "raw_logprobs")
    with triton_compiler.recording() as launches:
        warm_up(pipeline, num_columns, torch.bfloat16, torch.device("cpu"))
        warm = {_variant(launch) for launch in launches}
        launches.clear()
        for count in range(1, 6):
            logits = torch.zeros(count, num_columns, dtype=torch.bfloat16)
            masks = torch.full((count, -(-num_columns // 32)), -1, dtype=torch.int32)
            for asked in ASKED:
                rows = [_row(SamplingParams(top_p=0.9), **asked) for _ in range(count)]
                pipeline(logits, rows, masks if "mask" in asked else None)
        assert launches
        for launch in launches:
            assert _variant(launch) in warm, f"{launch.name} is compiled anew"


ASKED = [
    {},
    {"banned": [0, 1, 2]},
    {"mask": 0},
    {"mask": 0, "banned": [0]},
    {"num_logprobs": 0},
    {"num_logprobs": 1, "banned": [0]},
    {"num_logprobs": 20, "mask": 0},
    {"candidates": Candidates(6, normalized=True), "mask": 0},
    {"candidates": Candidates(8, normalized=False)},
]


def _variant(launch):
    """What Triton compiles a kernel for."""
    result = [launch.name]
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            result.append(value)
        elif isinstance(value, torch.Tensor):
            result.append((value.dtype, value.storage_offset() * value.element_size() % 16 == 0))
        elif not parameter.do_not_specialize:
            result.append((type(value), value == 1, value % 16 == 0))
    return tuple(result)
