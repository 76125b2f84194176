"""What `shardc calibrate` makes of what it measures."""

import pytest

from shardc.cost import calibrate


class _Told(calibrate._Bench):  # pyright: ignore[reportPrivateUsage]  # its measurements, without processes
    """Seconds of all-reduces alone, and what they add to computing, by size."""

    def __init__(self, seconds: dict[int, tuple[float, float]]) -> None:
        self.told = seconds

    def left(self, axis: str, size: int) -> tuple[float, float]:
        return self.told[size]


SHORT, LONG = calibrate.BENEATH


@pytest.mark.parametrize(
    ("short", "long", "overlap", "stall"),
    [
        ((1e-3, 0.9e-3), (2e-2, 4.7e-3), 0.8, 0.7e-3),  # a fifth of each, and 0.7 ms
        ((1e-3, 0.2e-3), (2e-2, 4e-3), 0.8, 0.0),
        ((1e-3, 0.0), (2e-2, 0.0), 1.0, 0.0),
        ((1e-3, 1.5e-3), (2e-2, 2.5e-2), 0.0, 0.0),  # beside computing they take longer than alone
    ],
)
def test_overlap_and_stall(short: tuple[float, float], long: tuple[float, float], overlap: float, stall: float) -> None:
    found = _Told({SHORT: short, LONG: long}).overlapping("dp")
    assert found == (pytest.approx(overlap), pytest.approx(stall, abs=1e-9))
