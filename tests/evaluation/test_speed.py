"""Speed, on a clock that the test winds itself."""

import pytest
import torch

from onestill.core import devices
from onestill.core.devices import seconds_of
from onestill.evaluation.speed import compare


class Clock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(devices, "perf_counter", clock)
    return clock


def test_compare_takes_turns_and_medians(clock: Clock) -> None:
    order: list[str] = []

    def candidate(name: str, seconds: float) -> None:
        order.append(name)
        # Something else hogs the machine once, in the middle of one call.
        clock.work(50.0 if len(order) == 5 else seconds)

    seconds = compare({"slow": lambda: candidate("slow", 3.0), "fast": lambda: candidate("fast", 1.0)}, repeats=5)
    assert seconds == pytest.approx({"slow": 3.0, "fast": 1.0})
    assert list(seconds) == ["slow", "fast"]
    assert order[:2] == ["slow", "fast"], "the warm-up"
    assert order[2:6] == ["slow", "fast", "fast", "slow"], "each round starts with another one"


def test_compare_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        compare({})
    with pytest.raises(ValueError, match="repeats must be at least 1 .* got 0 and 1"):
        compare({"a": lambda: None}, repeats=0)


def test_the_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", events.append)
    compare({"a": lambda: events.append("call")}, device="cuda:1", repeats=1, warmup=0)
    assert events == [(place := torch.device("cuda:1")), "call", place]
    compare({"a": lambda: events.append("call")}, repeats=1, warmup=0)
    assert len(events) == 4, "a CPU is not"


def test_what_is_faster_than_the_clock_takes_some_time(clock: Clock) -> None:
    assert seconds_of(lambda: None, torch.device("cpu")) > 0
    assert seconds_of(lambda: clock.work(2.0), torch.device("cpu")) == pytest.approx(2)


def test_real_clock_orders_real_work() -> None:
    small, large = torch.rand(8, 8), torch.rand(400, 400)
    seconds = compare({"large": lambda: large @ large, "small": lambda: small @ small}, repeats=15)
    assert seconds["small"] < seconds["large"]
