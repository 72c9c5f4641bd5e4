"""Metrics: pure functions of features, real [N, D] and generated [M, D], in double precision.

None touches the global random state or knows where the features come from: the protocol beside the numbers says that.
Each raises ValueError where there are too few rows, the shapes do not fit, or a feature is not finite.
"""

import warnings

import torch
from torch import Tensor, nn

from onestill.evaluation.gaussians import frechet, gaussian_of

_CHUNK = 4096
_MOST_ROWS = 5000
"""Rows that each row is compared with for an interval of the kernel distance."""


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    r"""Return the Fréchet distance between Gaussians fitted to the two sets of features.

    |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)), with sample means mu and unbiased covariances S. It shrinks as
    N and M grow: compare numbers of equal counts only, and see `sample_warning`.

    Args:
        real: [N, D], N >= 2.
        fake: [M, D], M >= 2.

    Source:
        Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium" (there with Inception features: FID).
    """
    real, fake = _checked(real, fake)
    return frechet(gaussian_of(real), gaussian_of(fake))


def kernel_distance(
    real: Tensor, fake: Tensor, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    r"""Return mean and standard deviation, over random subsets, of the unbiased kernel distance.

    MMD^2 with the kernel k(a, b) = (a . b / D + 1)^3; computed by torchmetrics. Unbiased at any number of
    images, so its expectation is 0 for equal distributions and single values may be negative.

    Args:
        real: [N, D].
        fake: [M, D].
        subset_size: Rows per subset, 2 <= `subset_size` <= min(N, M).
        num_subsets: Subsets that are averaged.
        seed: Seed of the subsets.

    Source:
        Bińkowski et al. 2018, "Demystifying MMD GANs" (there with Inception features: KID).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = _checked(real, fake)
    if not 2 <= subset_size <= min(len(real), len(fake)):
        found = f"{subset_size} for {len(real)} real and {len(fake)} generated images"
        todo = "lower it or generate more images"
        raise ValueError(f"subset_size must lie between 2 and the smaller set, got {found}: {todo}")
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        # torchmetrics draws from the CPU's global generator; torch.manual_seed would reseed CUDA's as well.
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(
            _Identity(real.shape[1]), subsets=num_subsets, subset_size=subset_size, sync_on_compute=False
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def kernel_parts(real: Tensor, fake: Tensor) -> Tensor:
    """Return what each row of `fake` contributes to the kernel distance, to the first order, [M].

    2 (the mean kernel with the other generated rows, less that with the real ones); of 5,000 rows at most each.
    """
    real, fake = _checked(real, fake)
    some_real, some_fake = real[:_MOST_ROWS], fake[:_MOST_ROWS]
    found = []
    for first in range(0, len(fake), _CHUNK // 4):
        rows = fake[first : first + _CHUNK // 4]
        own, cross = ((rows @ to.T / rows.shape[1] + 1).pow(3) for to in (some_fake, some_real))
        place = torch.arange(len(fake), device=rows.device)
        itself = place[first : first + len(rows), None] == place[: len(some_fake)]
        others = own.masked_fill(itself, 0).sum(dim=1) / (~itself).sum(dim=1)
        found.append(2 * (others - cross.mean(dim=1)))
    return torch.cat(found)


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision (quality) and recall (diversity), both in [0, 1].

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest neighbour
    within the set. Precision is the share of generated features inside the real manifold; recall is the
    share of real features inside the generated one. Distances are taken in chunks, so memory grows with
    N + M and not with N * M.

    Args:
        real: [N, D], N > k.
        fake: [M, D], M > k.
        k: Which neighbour sets a ball's radius.

    Source:
        Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models".
    """
    inside, found = precision_recall_hits(real, fake, k=k)
    return float(inside.double().mean()), float(found.double().mean())


def precision_recall_hits(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return which generated features [M] lie in the real manifold, and which real ones [N] in the generated one."""
    real, fake = _checked(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        found = f"k={k} for {len(real)} real and {len(fake)} generated images"
        raise ValueError(f"k must lie between 1 and the smaller set less one, got {found}")
    origin = real.mean(dim=0)
    real, fake = real - origin, fake - origin
    return _inside(fake, real, k), _inside(real, fake, k)


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose logits [N, num_classes] say the label [N] that they were generated for."""
    return float(label_hits(logits, labels).double().mean())


def label_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for which images [N] the logits [N, num_classes] say the label [N] that they were generated for."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        found = f"{list(logits.shape)} and {list(labels.shape)}"
        raise ValueError(f"logits must be [N, num_classes] and labels [N] with N >= 1, got {found}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1} for this classifier, got {found}")
    return logits.argmax(dim=1) == labels.to(logits.device)


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, Tensor]:
    """Return the Inception Score, the mean over `splits` parts of the images, and what each image contributes, [N].

    exp(mean of KL(p(y | x) || p(y))) in each part, p(y) the mean of p(y | x) there; parts are images that follow each
    other. A contribution is the derivative by the image's weight, KL times the part's score.

    Args:
        logits: [N, num_classes] of the Inception network, N >= `splits`.
        splits: How many parts.

    Source:
        Salimans et al. 2016, "Improved Techniques for Training GANs".
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"logits must be [N, num_classes] with N >= {splits}, got {list(logits.shape)}")
    scores, parts = [], []
    for rows in torch.tensor_split(logits.double().log_softmax(dim=1), splits):
        marginal = rows.exp().mean(dim=0)
        distances = (rows.exp() * (rows - marginal.log())).nansum(dim=1)
        scores.append(distances.mean().exp())
        parts.append(distances * scores[-1])
    return float(torch.stack(scores).mean()), torch.cat(parts)


def sample_warning(num_real: int | None, num_fake: int, feature_dim: int) -> str | None:
    """Return why a Fréchet distance of so few images is not to be trusted, or None where there are enough.

    With no more images than feature dimensions the covariance is singular, and the distance is mostly bias. How many real
    ones there were is None where nobody knows.
    """
    if (num_fake if num_real is None else min(num_real, num_fake)) > feature_dim:
        return None
    real = "" if num_real is None else f"{num_real} real and "
    return (
        f"the Fréchet distance rests on {real}{num_fake} generated images in {feature_dim} "
        f"feature dimensions: with no more images than dimensions it is mostly bias; take more images"
    )


class _Identity(nn.Identity):
    """torchmetrics' door for features that exist already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _checked(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets in double precision (on the CPU where the device has none), or say what is wrong."""
    for name, features in (("real", real), ("generated", fake)):
        if features.ndim != 2:
            raise ValueError(f"{name} features must be [N, D], got shape {list(features.shape)}")
        if len(features) < 2:
            raise ValueError(f"at least 2 {name} images are needed, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} features hold NaN or infinity: look at the images before measuring")
    if real.shape[1] != fake.shape[1]:
        found = f"{real.shape[1]} and {fake.shape[1]} dimensions"
        raise ValueError(f"real and generated features must come from one extractor, got {found}")
    device = torch.device("cpu") if real.device.type == "mps" else real.device
    return real.detach().to(device, torch.float64), fake.detach().to(device, torch.float64)


def _inside(points: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Return which points lie in a ball around some point of the manifold."""
    # Each row's nearest neighbour is itself, at distance 0: hence the (k + 1)-th smallest.
    own = torch.split(manifold, _CHUNK // 4)
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(k + 1, dim=1).values for rows in own])
    return torch.cat([(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in torch.split(points, _CHUNK // 4)])
