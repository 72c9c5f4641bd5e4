"""Speed, on a clock that the test winds itself."""

import pytest
import torch

from onestill.evaluation import speed
from onestill.evaluation.speed import compare, images_per_second


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
    monkeypatch.setattr(speed, "perf_counter", clock)
    return clock


def test_images_per_second_counts_images_and_not_the_warmup(clock: Clock) -> None:
    calls: list[int] = []

    def sample(batch_size: int) -> None:
        calls.append(batch_size)
        clock.work(10.0 if len(calls) <= 2 else 0.25)

    assert images_per_second(sample, 8, min_seconds=1.0, warmup=2) == pytest.approx(32)
    assert calls == [8] * (2 + 4)


def test_images_per_second_measures_at_least_one_call(clock: Clock) -> None:
    assert images_per_second(lambda _: clock.work(2.0), 1, min_seconds=0, warmup=0) == pytest.approx(0.5)


def test_images_per_second_of_something_faster_than_the_clock(clock: Clock) -> None:
    assert images_per_second(lambda _: None, 1, min_seconds=0) > 0


@pytest.mark.parametrize(
    ("batch_size", "min_seconds", "warmup", "message"),
    [
        (0, 1.0, 1, "batch_size must be at least 1, got 0"),
        (1, -1.0, 1, "must not be negative, got -1.0 and 1"),
        (1, 1.0, -1, "must not be negative, got 1.0 and -1"),
    ],
)
def test_images_per_second_says_what_is_wrong(batch_size: int, min_seconds: float, warmup: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images_per_second(lambda _: None, batch_size, min_seconds=min_seconds, warmup=warmup)


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
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    compare({"a": lambda: events.append("call")}, repeats=1, warmup=0)
    assert events == ["wait", "call", "wait"]


def test_real_clock_orders_real_work() -> None:
    small, large = torch.rand(8, 8), torch.rand(400, 400)
    seconds = compare({"large": lambda: large @ large, "small": lambda: small @ small}, repeats=15)
    assert seconds["small"] < seconds["large"]
