"""What a CUDA device is asked, asked of the CPU: so the questions are tested where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from device_checks import assert_same, check_splat, step
from mini_run import one_thread  # noqa: F401 - a fixture

from kdlab.distill import METHODS


def test_splat_is_the_naive_sum() -> None:
    check_splat("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_taken_twice_is_the_same_bit_for_bit(method: str) -> None:
    assert_same(step(method, "cpu"), step(method, "cpu"))


def test_another_batch_is_another_step() -> None:
    one, two = step("unidistill", "cpu"), step("unidistill", "cpu", seed=1)
    for other in (two, replace(one, losses=two.losses), replace(one, gradients=two.gradients)):
        with pytest.raises(AssertionError):
            assert_same(one, other, losses=1e-2, gradients=1e-2)
