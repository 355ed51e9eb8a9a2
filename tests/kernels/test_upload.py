"""Small arrays, brought to a device together."""

import numpy as np
import torch

from cadenza.kernels.upload import upload


def test_every_array_arrives_as_it_is_and_aligned():
    arrays = [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.zeros((0, 4), np.int32),
        np.arange(5, dtype=np.float32)[::2],
        np.arange(7, dtype=np.int32),
    ]
    tensors = upload(arrays, torch.device("cpu"))
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert tensor.data_ptr() % 16 == 0


def test_nothing_is_nothing():
    assert upload([], torch.device("cpu")) == []
    assert upload([np.zeros(0, np.int64)], torch.device("cpu"))[0].shape == (0,)
