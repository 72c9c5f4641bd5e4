"""Pictures of others as a reference: each is read as it looks, or refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onestill.core.errors import SettingError
from onestill.evaluation.references import folder_reference

RAMP = np.tile(np.linspace(0, 255, 8).round().astype(np.uint8), (6, 1))
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP // 2], -1)
DEEP = RAMP.astype(np.uint16) * 257


def read(folder: Path, channels: int = 3) -> torch.Tensor:
    return (folder_reference(folder, (channels, 6, 8)).images[0].movedim(0, -1) + 1) * 127.5


def twice(folder: Path, picture: Image.Image, name: str = "a.png", **how: object) -> Path:
    for prefix in ("1", "2"):
        picture.save(folder / f"{prefix}{name}", **how)
    return folder


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_are_scaled(tmp_path: Path, name: str, order: str) -> None:
    picture = Image.fromarray(DEEP.astype("<u2"))
    if order == ">u2" and name == "a.tif":
        picture = Image.frombytes("I;16B", (8, 6), DEEP.astype(">u2").tobytes())
    found = read(twice(tmp_path, picture, name))
    assert np.abs(found.numpy() - RAMP[..., None]).max() < 0.6


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_looks_alike(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray((RAMP > 127).astype(np.uint8) * 255)
    found = read(twice(tmp_path, grey.convert(mode), "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"))
    assert np.abs(found.numpy() - np.asarray(grey)[..., None]).max() < 30, mode  # JPEG rings


def test_orientation_is_applied(tmp_path: Path) -> None:
    upright = Image.fromarray(COLOURS)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise to be seen
    found = read(twice(tmp_path, turned, exif=exif))
    torch.testing.assert_close(found, torch.tensor(COLOURS).float())


def test_hidden_files_are_none(tmp_path: Path) -> None:
    twice(tmp_path, Image.fromarray(COLOURS))
    for name in ("._1a.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / ".cache" / "x.png")
    (tmp_path / "folder.png").mkdir()
    assert len(folder_reference(tmp_path, (3, 6, 8)).images) == 2


def bad(folder: Path, kind: str) -> None:
    picture, path = Image.fromarray(COLOURS), folder / "bad.png"
    match kind:
        case "truncated":
            picture.save(path)
            path.write_bytes(path.read_bytes()[:-40])
        case "empty":
            path.touch()
        case "text":
            path.write_text("no picture")
        case "frames":
            picture.save(folder / "bad.gif", save_all=True, append_images=[Image.new("RGB", (8, 6))])
        case "pages":
            picture.save(folder / "bad.tif", save_all=True, append_images=[picture])
        case "transparent":
            Image.fromarray(np.dstack([COLOURS, RAMP])).save(path)
        case "clear palette":
            palette = picture.quantize()
            palette.save(path, transparency=palette.getpixel((0, 0)))
        case "float":
            Image.fromarray(RAMP.astype(np.float32)).save(folder / "bad.tif")
        case "32 bits":
            Image.fromarray(RAMP.astype(np.int32)).save(folder / "bad.tif")
        case "size":
            Image.new("RGB", (9, 6)).save(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "is no whole picture"),
        ("empty", "is no whole picture"),
        ("text", "is no whole picture"),
        ("frames", "has 2 frames"),
        ("pages", "has 2 frames"),
        ("transparent", "transparent pixels"),
        ("clear palette", "transparent pixels"),
        ("float", "32 bits"),
        ("32 bits", "32 bits"),
        ("size", "is 9x6, the teacher makes 8x6"),
    ],
)
def test_others_are_refused_by_name(tmp_path: Path, kind: str, words: str) -> None:
    twice(tmp_path, Image.fromarray(COLOURS))
    bad(tmp_path, kind)
    with pytest.raises(SettingError, match=rf"bad\.\w+ .*{words}") as error:
        folder_reference(tmp_path, (3, 6, 8))
    assert "\n" not in str(error.value)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(SettingError, match=r"1a\.png .*exceeds limit"):
        folder_reference(twice(tmp_path, Image.fromarray(COLOURS)), (3, 6, 8))


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds 0 images"):
        folder_reference(tmp_path, (3, 6, 8))
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    with pytest.raises(SettingError, match="is a file; give"):
        folder_reference(tmp_path / "a.png", (3, 6, 8))
    with pytest.raises(SettingError, match="no such folder"):
        folder_reference(tmp_path / "none", (3, 6, 8))
    with pytest.raises(SettingError, match="no samples of shape 4x6x8"):
        folder_reference(tmp_path, (4, 6, 8))
