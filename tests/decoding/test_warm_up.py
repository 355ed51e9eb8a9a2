"""What is compiled before the first request: each kernel that the logits pipeline commonly launches."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.decoding.fused_logits import FusedLogitsPipeline
from cadenza.decoding.warm_up import warm_up


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
