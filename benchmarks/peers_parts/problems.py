"""The teachers of the peers' benchmark, how near to their data samples are, and the count of network evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy.special import hyp1f1
from sklearn.datasets import load_digits
from torch import Tensor

from onestill.core.files import save_tensors
from onestill.core.tensors import Cond, broadcast
from onestill.data.conditions import LabelConditions
from onestill.diffusion.process import CosineVP
from onestill.evaluation.choice import choose_features
from onestill.evaluation.features import ClassifierFeatures, extract
from onestill.evaluation.metrics import frechet_distance, label_accuracy, precision_recall
from onestill.evaluation.references import embedded_reference
from onestill.sampling.generate import Generate, teacher_generator
from onestill.teachers.base import Teacher
from onestill.teachers.closed_form import MixtureTeacher
from onestill.teachers.load import load_teacher
from onestill.teachers.module import module_teacher
from toys import PointNetwork, mixture

Numbers = dict[str, float]
FORWARD, WITH_BACKWARD = 1, 3


class Counter:
    """Network evaluations: a row's forward pass is 1, with its backward pass 3; guidance's two rows are two.

    Counted in the one method through which every network is called, the teacher's, the student's and any other.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.spent, self._counts = 0, True
        self._teacher, call = teacher, teacher.call

        def counted(network: Callable[..., object], x_t: Tensor, net_time: Tensor, cond: Cond) -> Tensor:
            output = call(network, x_t, net_time, cond)
            if self._counts:
                self.spent += len(x_t) * (WITH_BACKWARD if output.requires_grad else FORWARD)
            return output

        teacher.call = counted  # type: ignore[method-assign]

    def close(self) -> None:
        """Let the teacher be called without being counted from now on."""
        del self._teacher.call

    @contextmanager
    def counting(self, counts: bool = True) -> Iterator[None]:
        """Count, or not, for a while: measuring is no training."""
        before, self._counts = self._counts, counts
        try:
            yield
        finally:
            self._counts = before


@dataclass
class Problem:
    """A teacher and what is known of its data.

    Attributes:
        name: Its name.
        teacher: The teacher, a network.
        images: Its data, [N, *sample_shape]: for the methods that use data.
        labels: Their labels, [N]; None if it has none.
        measure: (samples, their conditions) -> numbers, `distance` among them: 0 for the data's own law.
        distance: What `distance` is.
        num_samples: Samples that are measured.
        batch_size: Rows in a training step of every method.
        evaluations: The usual budget.
        rates: The learning rates that every method is tried with.
        end_steps: Midpoint steps of the teacher's own map, to which the distance of a sample from the same noise is
            told; 0 leaves that out.
    """

    name: str
    teacher: Teacher
    images: Tensor
    labels: Tensor | None
    measure: Callable[[Tensor, Cond], Numbers]
    distance: str
    num_samples: int
    batch_size: int
    evaluations: int
    rates: tuple[float, ...]
    end_steps: int = 0
    _ends: dict[int, Tensor] = field(default_factory=dict)

    @property
    def conditions(self) -> LabelConditions:
        """Where conditions are drawn from."""
        return LabelConditions(tuple(self.teacher.spec.labels))

    def data(self, num: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """Return `num` draws of the data with their conditions."""
        rows = torch.randint(len(self.images), (num,), generator=generator)
        return self.images[rows], {} if self.labels is None else {"class_labels": self.labels[rows]}

    def judge(self, generate: Generate, seed: int) -> Numbers:
        """Return the numbers of a sampler; the noise belongs to the seed, and no training sees it."""
        generator = torch.Generator().manual_seed(10**6 + seed)
        eps = torch.randn(self.num_samples, *self.teacher.spec.sample_shape, generator=generator)
        cond = self.conditions.grid(self.num_samples)
        torch.manual_seed(10**7 + seed)  # of samplers that draw noise on the way
        parts = [slice(i, i + 500) for i in range(0, self.num_samples, 500)]
        samples = torch.cat([generate(eps[p], {n: v[p] for n, v in cond.items()}) for p in parts])
        numbers = self.measure(samples, cond)
        if self.end_steps:
            if seed not in self._ends:
                exact = teacher_generator(self.teacher, num_steps=self.end_steps, solver="midpoint")
                self._ends[seed] = exact(eps, cond)
            numbers["rms"] = math.sqrt((samples - self._ends[seed]).square().mean())
        return numbers


def digits(_folder: Path) -> Problem:
    """Return the embedded digits, class-conditional 8x8 pixels, and the 1,797 real ones of scikit-learn."""
    teacher = load_teacher("digits")
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    extractor = choose_features("digits", teacher, local_files_only=True, device=torch.device("cpu"))
    assert isinstance(extractor, ClassifierFeatures)
    real = extract(extractor, embedded_reference("digits").images)

    def measure(samples: Tensor, cond: Cond) -> Numbers:
        samples = samples.clamp(-1, 1)
        features = extract(extractor, samples)
        precision, recall = precision_recall(real, features)
        accuracy = label_accuracy(extractor.logits(samples), cond["class_labels"])
        distance = frechet_distance(real, features)
        return {"distance": distance, "precision": precision, "recall": recall, "label_accuracy": accuracy}

    return Problem(
        "digits", teacher, images, torch.tensor(found.target), measure, "Fréchet distance", num_samples=2000,
        batch_size=64, evaluations=320_000, rates=(3e-4, 1e-3, 3e-3),
    )  # fmt: skip


def points(folder: Path) -> Problem:
    """Return the mixture of `toys.py` with a network fitted to its closed form as the teacher, kept in a file."""
    exact = mixture()
    process, path = CosineVP(1000.0), folder / "mixture-teacher.safetensors"
    network = PointNetwork(2)
    if path.exists():
        network.load_state_dict(load_file(path))
    teacher = module_teacher(network, process, "v_prediction", (2,))
    if not path.exists():
        fit(teacher, network, exact)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(network.state_dict(), path)

    def measure(samples: Tensor, _cond: Cond) -> Numbers:
        return {"distance": energy_distance(samples, exact)}

    images = exact.draw(100_000, torch.Generator().manual_seed(0))
    return Problem(
        "mixture", teacher, images, None, measure, "energy distance", num_samples=8000, batch_size=256,
        evaluations=1_000_000, rates=(3e-4, 1e-3, 3e-3), end_steps=100,
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[Path], Problem]] = {"mixture": points, "digits": digits}


def fit(teacher: Teacher, network: torch.nn.Module, exact: MixtureTeacher, steps: int = 4000, batch: int = 512) -> None:
    """Regress a network on a closed-form prediction, in units of its own output v."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in network.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        t = torch.rand(batch, generator=generator, dtype=torch.float64).clamp(min=1e-3)
        alpha, sigma = teacher.spec.process.alpha_sigma(t)
        x_0 = exact.draw(batch, generator)
        x_t = broadcast(alpha, x_0) * x_0 + broadcast(sigma, x_0) * torch.randn(batch, 2, generator=generator)
        error = teacher.denoised(x_t, t, {}) - exact.denoised(x_t, t, {})
        loss = (error / broadcast(sigma, error)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)


def energy_distance(samples: Tensor, exact: MixtureTeacher) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased over the samples X and exact over the mixture Y.

    E|x - N(mu, std^2 I)| in two dimensions is std sqrt(pi/2) 1F1(-1/2; 1; -|x - mu|^2 / (2 std^2)).
    """
    x, means = samples.double(), exact.means.double()

    def mean_distance(between: Tensor, std: float) -> Tensor:
        values = hyp1f1(-0.5, 1.0, -(between.numpy() ** 2) / (2 * std**2))
        return torch.as_tensor(values) * std * math.sqrt(math.pi / 2)

    cross = mean_distance(torch.cdist(x, means), exact.std).mean()
    own = mean_distance(torch.cdist(means, means), exact.std * math.sqrt(2)).mean()
    among = sum(float(torch.cdist(rows, x).sum()) for rows in x.split(2000)) / (len(x) * (len(x) - 1))
    return float(2 * cross - own) - among
