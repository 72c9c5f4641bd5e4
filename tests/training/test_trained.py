"""What is trained: its state goes to disk and back bit by bit, by name, and its averages follow it."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from onestill.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from onestill.training.config import make_config
from onestill.training.trained import Trained


class Net(nn.Module):
    """A frozen layer, and one whose weight is not laid out row by row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.first, self.last = nn.Linear(3, 4), nn.Conv2d(4, 2, 3, padding=1)
        self.last.weight.data = self.last.weight.data.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.frozen(x)).movedim(-1, 1))


def make_trained(seed: int = 0, name: str = "net", follower: nn.Module | None = None) -> Trained:
    given = {"learning_rate": 1e-2, "lr_scheduler": "constant", "ema_width": 0.1}
    config = make_config({"teacher": "x", "output_dir": "y", **given})
    decay = 0.5 if follower else 0.0
    given_averages = {"widths": config.ema_tracks, "follower": follower, "follower_decay": decay}
    return Trained(name, Net(seed), Accelerator(cpu=True), config, **given_averages)


def train(trained: Trained, num_steps: int) -> None:
    for _ in range(num_steps):
        trained.accelerator.backward(trained.model(torch.ones(2, 5, 5, 3)).square().mean())
        assert float(trained.clip()) > 0
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.schedule.step()
        trained.average()


def same(one: Trained, two: Trained) -> bool:
    groups, others = one.tensors(), two.tensors()
    assert groups.keys() == others.keys()
    return all(torch.equal(v, others[group][name]) for group, found in groups.items() for name, v in found.items())


def test_state_goes_to_disk_and_back_bit_by_bit(tmp_path: Path) -> None:
    trained, other = make_trained(), make_trained(seed=1)
    train(trained, 3)
    trained.optimizer.param_groups[0]["lr"] = 5e-3
    groups = trained.tensors()
    assert set(groups) == {"net", "net-optimizer", "net-ema", "net-ema_beside"}
    assert (
        set(groups["net"])
        == set(groups["net-ema"])
        == {f"{a}.{b}" for a in ("unused", "first", "last") for b in ("weight", "bias")}
    )
    moments = {
        f"{name}.{key}" for name in groups["net"] if "unused" not in name for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert set(groups["net-optimizer"]) == moments, "by name, and nothing of what is frozen or never had a gradient"
    read = read_checkpoint(write_checkpoint(tmp_path, 3, Checkpoint(groups, trained.values())))
    other.module.frozen.load_state_dict(trained.module.frozen.state_dict())  # type: ignore[union-attr, operator]
    other.restore(read.tensors, read.values, 3)
    assert other.learning_rate == 5e-3 and same(trained, other)
    assert len(other.optimizer.state) == 4
    for parameter, state in other.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride(), "the fused optimiser walks both in memory order"
    train(trained, 3)
    train(other, 3)
    assert same(trained, other)


def test_before_its_first_step_there_is_no_state_and_none_is_made(tmp_path: Path) -> None:
    trained, other = make_trained(), make_trained()
    assert set(trained.tensors()) == {"net", "net-ema", "net-ema_beside"} and not trained.optimizer.state
    other.restore(trained.tensors(), trained.values(), 0)
    train(trained, 2)
    train(other, 2)
    assert same(trained, other)


def test_a_follower_is_the_average_of_the_trained_weights() -> None:
    follower = Net(0)
    trained = make_trained(follower=follower)
    expected = {name: value.detach().clone() for name, value in trained.named_parameters().items()}
    for step in range(4):
        train(trained, 1)
        for name, value in trained.named_parameters().items():
            expected[name] = expected[name] + (0.5 if step else 1.0) * (value.detach() - expected[name])
    for name, value in follower.named_parameters():
        if name in expected and "unused" not in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, trained.named_parameters()[name]) and not value.requires_grad


def test_the_average_stands_in_for_a_while() -> None:
    trained = make_trained()
    train(trained, 5)
    before = {name: value.detach().clone() for name, value in trained.named_parameters().items()}
    with trained.averaged():
        inside = {name: value.detach().clone() for name, value in trained.named_parameters().items()}
    assert all(torch.equal(v, trained.tensors()["net-ema"][n]) for n, v in inside.items())
    assert any(not torch.equal(v, before[n]) for n, v in inside.items())
    assert all(torch.equal(v, before[n]) for n, v in trained.named_parameters().items())
