"""Models trained by four gloo processes equal single device."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "tp=4"])
def test_language_models_and_a_cnn_train_like_single_device(torchrun: Callable[..., str], mesh: str) -> None:
    names = ["llama", "gpt2", "resnet"]
    output = torchrun("zoo.py", mesh, *names, timeout=300)
    for name in names:
        assert output.count(f"{name} equals single device") == 4, output


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "tp=4"])
def test_dims_that_the_mesh_does_not_divide(torchrun: Callable[..., str], mesh: str) -> None:
    assert torchrun("uneven.py", mesh).count("odd sizes equal single device") == 4
