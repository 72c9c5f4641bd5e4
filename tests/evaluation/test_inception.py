"""The Inception network of the FID: its structure, its resize by hand, and which files of weights it takes."""

import functools
import hashlib
from pathlib import Path

import pytest
import torch
from runs_helpers import session_folder
from safetensors.torch import save_file
from torch import Tensor

from onestill.evaluation import inception
from onestill.evaluation.features import extract
from onestill.evaluation.inception import Inception, load_inception, resized


@functools.cache
def random_tensors() -> dict[str, Tensor]:
    """Weights of the usual file's names and shapes, of such sizes that signals neither die nor explode."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    draws, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(shape, generator=draws)
        if name.endswith(("running_var", "bn.weight")):
            found[name] = 1 + 0.1 * drawn.clamp(-3, 3)
        else:
            found[name] = 0.1 * drawn if len(shape) == 1 else drawn * (2 / shape[1:].numel()) ** 0.5
    return found


@functools.cache
def weights() -> tuple[Path, str]:
    """Return (a file such as the usual one, its SHA-256)."""
    path = session_folder() / "inception.pth"
    torch.save(random_tensors(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file of random weights that is taken for the usual one."""
    path, digest = weights()
    monkeypatch.setattr(inception, "SHA256", digest)
    return path


def test_the_network_has_the_parameters_of_the_usual_one() -> None:
    with torch.device("meta"):
        network = Inception()
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert state["fc.weight"] == (1008, 2048) and state["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert state["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_mean"] == (384,)
    assert state["Mixed_7b.branch_pool.conv.weight"] == (192, 1280, 1, 1)


def test_features_and_logits_of_random_weights(file: Path) -> None:
    extractor = load_inception(file)
    assert extractor.name == f"the Inception network of the FID (weights {weights()[1][:8]})"
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = extract(extractor, images)
    # Grey is grey in three channels, and pictures are what they are stored as.
    stored = ((images + 1) * 127.5).round() / 127.5 - 1
    torch.testing.assert_close(features, extract(extractor, stored.expand(-1, 3, -1, -1)))
    assert features.shape == (2, 2048) and (features >= 0).all() and features.std() > 0.01
    # Computed once by another implementation of the same network, with these weights.
    assert features.view(2, 4, 512).mean(dim=2).flatten().tolist() == pytest.approx(GOLDEN, rel=1e-3)
    expected = features @ random_tensors()["fc.weight"].T
    torch.testing.assert_close(extractor.class_logits(features), expected)
    with pytest.raises(ValueError, match=r"sees grey or RGB images, \[N, 1 or 3, H, W\], and was given \[1, 4, 8, 8\]"):
        extractor(torch.zeros(1, 4, 8, 8))


GOLDEN = [0.30419, 0.34275, 0.3101, 0.35207, 0.30436, 0.34411, 0.30869, 0.35154]


def test_pools_do_not_count_the_border() -> None:
    with torch.device("meta"):
        average, maximum = Inception().Mixed_7b, Inception().Mixed_7c
    assert (average.pool, maximum.pool) == ("average", "maximum")
    block = inception._Mixed(1, [], "average", 1)
    block.branch_pool = torch.nn.Identity()
    ramp = torch.arange(9.0).reshape(1, 1, 3, 3)
    # In a corner four pixels are averaged, at an edge six.
    assert block(ramp)[0, 0].tolist() == [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]
    block.pool = "maximum"
    assert block(ramp)[0, 0].tolist() == [[4, 5, 5], [7, 8, 8], [7, 8, 8]]


def test_resizing_is_that_of_tensorflow_1() -> None:
    row = torch.tensor([[[[0.0, 12.0, 36.0]]]])
    # Pixel i of 6 is taken at i / 2: neither centred nor with aligned corners, and the last one is repeated.
    assert resized(row, 6)[0, 0, 0].tolist() == [0, 6, 12, 24, 36, 36]
    # From 3 to 2 at 1.5 i, without a look at what lies between.
    assert resized(row, 2)[0, 0, 0].tolist() == [0, 24]
    square = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    assert resized(square, 4)[0, 0].tolist() == [[0, 1, 2, 2], [2, 3, 4, 4], [4, 5, 6, 6], [4, 5, 6, 6]]
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(resized(images), images)


def test_a_safetensors_of_the_tensors_says_which(file: Path, tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "w.safetensors")
    other = load_inception(tmp_path / "w.safetensors")
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()[:8]
    assert f"(safetensors {digest}, not checked against {inception.SHA256[:8]})" in other.name
    images = torch.zeros(1, 3, 4, 4)
    assert torch.equal(other(images), load_inception(file)(images))


def test_other_files_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest = weights()
    for known in (inception.SHA256, digest[:8] + inception.SHA256[8:]):  # one that begins alike is another
        monkeypatch.setattr(inception, "SHA256", known)
        with pytest.raises(ValueError, match=f"=.*has the SHA-256 {digest[:8]}..., which is not that of .*6726"):
            load_inception(path)
    with pytest.raises(ValueError, match="features_weights=.*no such file; give pt_inception-2015-12-05-6726825d.pth"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="features_weights=.*: is a folder"):
        load_inception(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, "lacks fc.weight of the network's weights"),
        ({"mine": torch.zeros(1)}, "holds 'mine', which the network has not"),
        ({"fc.bias": torch.zeros(7)}, r"holds fc.bias of shape \[7\], and the network's has \[1008\]"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, "holds NaN or infinity in fc.bias"),
    ],
)
def test_other_tensors_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {name: value for name, value in (random_tensors() | change).items() if value is not None}
    monkeypatch.setattr(inception, "_content", lambda _: b"")
    monkeypatch.setattr(inception, "load", lambda _: held)
    with pytest.raises(ValueError, match=f"features_weights=.*{message}"):
        load_inception(tmp_path / "w.safetensors")


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="features_weights=.*cannot be read"):
        load_inception(tmp_path / "w.safetensors")
