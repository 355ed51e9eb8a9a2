"""The real model that tests share: loaded once a session, converted once a cache."""

from pathlib import Path

import pytest
import torch

from cadenza.models import LoadConfig, LoadedModel, load_model

torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2", LoadConfig(dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def smollm2_path(smollm2: LoadedModel) -> Path:
    return smollm2.path
