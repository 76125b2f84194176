"""The runtime over gloo: the same values as eager and as the virtual mesh, and failures that end every rank."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("script", ["train.py", "routings.py"])
def test_training_and_five_hundred_routings_of_experts(spawn, script):
    for rank, (code, output) in enumerate(spawn(script)):
        assert code == 0, output
        assert f"rank {rank} is right" in output, output


@pytest.mark.parametrize("nproc", [2, 3])
def test_operators_along_split_dims_equal_whole_ones(spawn, nproc):
    for rank, (code, output) in enumerate(spawn("bodies.py", nproc=nproc)):
        assert code == 0, output
        assert f"rank {rank} is right" in output


def test_a_ring_equals_attention_of_one_device(spawn):
    for rank, (code, output) in enumerate(spawn("beside/attention.py", nproc=4)):
        assert code == 0, output
        assert f"rank {rank} is right" in output


def test_rings_of_products_equal_whole_ones(spawn):
    for rank, (code, output) in enumerate(spawn("beside/products.py", nproc=4)):
        assert code == 0, output
        assert f"rank {rank} is right" in output


@pytest.mark.parametrize(("accident", "nproc"), [("raise", 2), ("kill", 4), ("hang", 2)])
def test_accident_ends_every_rank(spawn, accident, nproc):
    results = spawn("fail.py", accident, nproc=nproc)
    last = nproc - 1
    for rank, (code, output) in enumerate(results):
        assert code != 0, output
        if rank < last:
            assert f"RankError: rank {rank}" in output, output
            place = r"in all_reduce over axis '[ab]' at .*: .*(all_reduce|wait)\(.*# .*model.py:[89]"
            assert re.search(place, output), output
            assert float(re.findall(r"ended after ([\d.]+) s", output)[0]) < 7
    peer = results[last - nproc // 2][1]  # on the axis of the first collective after the accident
    assert "over axis 'a'" in peer and "model.py:8" in peer
    if accident == "raise":
        assert "# the accident, model.py:7" in results[last][1]


def test_the_rank_that_keeps_the_store_is_stopped(spawn):
    _, (code, output) = spawn("fail.py", "stop", nproc=2)
    assert code == 1, output
    assert re.search(r"RankError: rank 1 .* failed in all_reduce over axis 'a' at .*model.py:8", output), output
    assert float(re.findall(r"ended after ([\d.]+) s", output)[0]) < 7
