"""Samples as pictures: the bytes of a pixel, where a sample stands in a sheet, and what may be written where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from onestill.sampling.explore import Sheet
from onestill.sampling.pictures import (
    check_output,
    is_picture,
    read_pixels,
    save_gif,
    save_grid,
    save_rows,
    save_samples,
    to_pil,
)


def shade(num: int, value: float, channels: int = 1, size: int = 8) -> Tensor:
    return torch.full((num, channels, size, size), value)


def contains(sheet: np.ndarray, tile: np.ndarray) -> int:
    """Return how many times `tile` stands in `sheet`, pixel for pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)
    return int((windows == tile).all(axis=(-1, -2, -3)).sum())


# Pixels


def test_pixels_are_the_bytes_of_the_range() -> None:
    values = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, -7.0, 3.0, 0.9999]).reshape(1, 1, 2, 4)
    (picture,) = to_pil(values)
    # (x + 1) * 127.5, halves to even; outside [-1, 1] is clipped.
    assert np.asarray(picture)[..., 0].tolist() == [[0, 64, 128, 191], [255, 0, 255, 255]]


def test_bytes_survive_the_way_through_a_picture() -> None:
    pixels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    (picture,) = to_pil(pixels / 127.5 - 1)
    assert np.array_equal(np.asarray(picture)[..., 0], pixels[0, 0].to(torch.uint8).numpy())


def test_channels_are_red_green_blue() -> None:
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 0] = 1
    (picture,) = to_pil(image)
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 0, 0)
    (grey,) = to_pil(shade(1, 0.0))
    assert grey.mode == "RGB" and grey.getpixel((3, 3)) == (128, 128, 128)


def test_rows_and_columns_are_not_swapped() -> None:
    image = torch.full((1, 1, 2, 3), -1.0)
    image[0, 0, 0, 2] = 1  # first row, last column
    (picture,) = to_pil(image)
    assert picture.size == (3, 2) and picture.getpixel((2, 0)) == (255, 255, 255)


def test_pictures_can_be_enlarged() -> None:
    pictures = to_pil(shade(2, 0.5), width=64)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert pictures[0].getpixel((31, 31)) == (191, 191, 191)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_drawn(dtype: torch.dtype) -> None:
    (picture,) = to_pil(shade(1, 1.0).to(dtype))
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_non_finite_images_are_drawn() -> None:
    # A run that diverges still shows its picture.
    assert len(to_pil(torch.full((1, 3, 4, 4), float("nan")))) == 1


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (4, 8, 8), (8, 8), (1, 2, 8, 8)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    assert not is_picture(shape)
    with pytest.raises(ValueError, match=r"no pictures; a .safetensors can hold them"):
        to_pil(torch.zeros(3, *shape))


# Sheets


def test_rows_stand_below_each_other_and_columns_share_their_place(tmp_path: Path) -> None:
    values = [[-1.0, -0.5, 0.0], [0.25, 0.5, 0.75]]
    rows = {f"row {i}": torch.cat([shade(1, value) for value in row]) for i, row in enumerate(values)}
    path = save_rows(rows, tmp_path / "deep" / "folder" / "sheet.png", title="a title", size=20)
    assert path == tmp_path / "deep" / "folder" / "sheet.png"
    sheet = read_pixels(path)
    places = {}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = round((value + 1) * 127.5)
            found = np.argwhere((sheet == colour).all(-1) & _in_block(sheet, colour, 20))
            assert len(found) == 1, f"one tile of shade {colour}"
            places[i, j] = tuple(found[0])
    assert places[0, 0][0] == places[0, 1][0] == places[0, 2][0] < places[1, 0][0]
    assert places[0, 0][1] == places[1, 0][1] < places[0, 1][1] == places[1, 1][1] < places[0, 2][1]
    assert bool((sheet[-1] == 255).all()), "paper all round"


def _in_block(sheet: np.ndarray, colour: int, size: int) -> np.ndarray:
    """Return where a square of `size` equal pixels has its upper left corner."""
    same = (sheet == colour).all(-1)
    windows = np.lib.stride_tricks.sliding_window_view(same, (size, size)).all(axis=(-1, -2))
    corners = np.zeros_like(same)
    corners[: windows.shape[0], : windows.shape[1]] = windows
    return corners


def test_captions_and_title_are_drawn(tmp_path: Path) -> None:
    bare = read_pixels(save_rows({"": shade(2, 1.0)}, tmp_path / "bare.png"))
    with_caption = read_pixels(save_rows({"teacher, 50 steps": shade(2, 1.0)}, tmp_path / "caption.png"))
    with_title = read_pixels(save_rows({"": shade(2, 1.0)}, tmp_path / "title.png", title="a long title of a picture"))
    assert bool((bare == 255).all()), "white samples on white paper"
    assert int((with_caption < 128).sum()) > 50 and with_caption.shape[1] > bare.shape[1]
    assert int((with_title < 128).sum()) > 50 and with_title.shape[0] > bare.shape[0]


def test_long_titles_fit(tmp_path: Path) -> None:
    sheet = read_pixels(save_rows({"a": shade(1, 1.0)}, tmp_path / "sheet.png", title="words " * 40))
    assert bool((sheet[:, -6:] == 255).all()), "the title ends before the edge"
    assert sheet.shape[1] > 800


def test_pictures_that_are_no_squares_keep_their_shape(tmp_path: Path) -> None:
    wide = torch.full((2, 3, 16, 48), -1.0)
    assert [picture.size for picture in to_pil(wide, width=480)] == [(480, 160)] * 2
    for num, path in (
        (4, save_rows({"a": wide, "b": wide}, tmp_path / "rows.png", size=480)),
        (1, save_gif(wide[:, None], tmp_path / "words.gif", columns=[["x"], ["y"]], size=480)),
        (1, save_gif(wide[:, None], tmp_path / "plain.gif", size=480)),
    ):
        with Image.open(path) as drawn:  # black pictures, and words that are not quite black
            assert (np.asarray(drawn.convert("L")) < 20).sum() == num * 480 * 160, path


def test_rows_may_be_of_different_lengths(tmp_path: Path) -> None:
    sheet = read_pixels(save_rows({"": shade(2, -1.0), "b": shade(5, 0.0)}, tmp_path / "sheet.png", size=10))
    assert _in_block(sheet, 0, 10).sum() == 2 and _in_block(sheet, 128, 10).sum() == 5


def test_large_samples_are_not_shrunk(tmp_path: Path) -> None:
    noise = torch.rand(1, 3, 100, 100) * 2 - 1
    sheet = read_pixels(save_rows({"": noise}, tmp_path / "sheet.png", size=56))
    assert contains(sheet, np.asarray(to_pil(noise)[0])) == 1


@pytest.mark.parametrize("shape", [(2,), (1,)])
def test_points_are_scattered(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rows = {"teacher": torch.randn(50, *shape), "student": torch.randn(50, *shape)}
    sheet = read_pixels(save_rows(rows, tmp_path / "points.png", title="step 10"))
    assert sheet.shape[1] > 1.5 * sheet.shape[0], "one plot beside the other"
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 10


@pytest.mark.parametrize("num", [*range(2, 21), 64, 100])
def test_grid_holds_every_image_and_is_near_square(tmp_path: Path, num: int) -> None:
    images = torch.linspace(-1, 0.9, num).reshape(-1, 1, 1, 1).expand(num, 3, 4, 4)
    grid = read_pixels(save_grid(images, tmp_path / "grid.png", size=4))
    tiles = [tuple(tile.reshape(-1)[:3]) for tile in _tiles(grid, 4)]
    colours = [tuple(np.asarray(picture)[0, 0]) for picture in to_pil(images)]
    assert tiles[:num] == colours, "in the order they came, row by row"
    assert (len(tiles) - num) == tiles.count((255, 255, 255)), "the rest is paper"
    rows, columns = (grid.shape[0] - 8) // 12, (grid.shape[1] - 8) // 12
    assert rows * columns == len(tiles) and rows * columns - num < max(rows, columns), "no empty row or column"
    assert max(rows, columns) <= 3 * min(rows, columns)


def _tiles(grid: np.ndarray, size: int) -> list[np.ndarray]:
    """Return the tiles of a grid without words, all of which have paper around them."""
    ys, xs = (range(8, length, size + 8) for length in grid.shape[:2])
    paper = grid.copy()
    for y in ys:
        for x in xs:
            paper[y : y + size, x : x + size] = 255
    assert bool((paper == 255).all()), "a gutter between the tiles and around them"
    return [grid[y : y + size, x : x + size] for y in ys for x in xs]


def test_small_images_of_a_grid_are_enlarged_a_whole_number_of_times_and_keep_their_shape(tmp_path: Path) -> None:
    def shape_of(height: int, width: int) -> tuple[int, ...]:
        images = torch.zeros(4, 1, height, width)
        return read_pixels(save_grid(images, tmp_path / "grid.png")).shape

    assert shape_of(32, 32) == (2 * 128 + 3 * 8, 2 * 128 + 3 * 8, 3)
    assert shape_of(16, 32) == (2 * 64 + 3 * 8, 2 * 128 + 3 * 8, 3)
    assert shape_of(200, 120) == (2 * 200 + 3 * 8, 2 * 120 + 3 * 8, 3)


def test_large_images_of_a_grid_are_exact(tmp_path: Path) -> None:
    noise = torch.rand(2, 3, 120, 120) * 2 - 1
    grid = read_pixels(save_grid(noise, tmp_path / "grid.png", words=("one", "two")))
    assert [contains(grid, np.asarray(picture)) for picture in to_pil(noise)] == [1, 1]


def test_one_image_is_a_picture_of_its_own(tmp_path: Path) -> None:
    noise = torch.rand(1, 3, 8, 8) * 2 - 1
    picture = read_pixels(save_grid(noise, tmp_path / "one.png", words=("a cat",)))
    assert np.array_equal(picture, np.asarray(to_pil(noise)[0]))


@pytest.mark.parametrize(
    ("num", "words", "columns", "captions"),
    [
        (16, ["a", "b"], 4, [True, False, False, False]),
        (9, ["a", "b", "c", "d"], 4, [True, False, False]),
        (6, ["a", "b", "c", "d", "e", "f"], 3, [True, True]),
        (16, [*"abcdefghij"], 4, [True, True, True, True]),
        (30, [*"abcdefghij"], 10, [True, False, False]),
        (4, ["a", "a", "b", "b"], 2, [True, True]),
        (4, ["a"], 2, [False, False]),
        (4, [], 2, [False, False]),
    ],
)
def test_a_grid_says_what_its_images_are_of(
    tmp_path: Path, num: int, words: list[str], columns: int, captions: list[bool]
) -> None:
    said = [words[i % len(words)] for i in range(num)] if words else []
    grid = read_pixels(save_grid(shade(num, 0.0), tmp_path / "grid.png", words=said, size=8))
    grey = (grid == 128).all(-1)
    assert grey.any(0).sum() == columns * 8
    (tops,) = np.nonzero(np.diff(grey[:, 8].astype(int)) == 1)
    starts, ends = tops + 1, [0, *(tops[:-1] + 9)]
    # Ink in the gap above a row of images is its captions.
    assert [bool((grid[a:b] < 100).any()) for a, b in zip(ends, starts, strict=True)] == captions


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (4, 8, 8), (2, 8)])
def test_rows_of_what_is_no_picture_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no pictures; a .safetensors can hold them"):
        save_rows({"a": torch.zeros(2, *shape)}, tmp_path / "new" / "x.png")
    sheet = Sheet(torch.zeros(1, 2, *shape), ("a",), ("", ""))
    with pytest.raises(ValueError, match="no pictures"):
        sheet.save(tmp_path / "new" / "x.png")
    assert list(tmp_path.iterdir()) == []


# Samples on disk


def test_samples_as_tensors_are_exact(tmp_path: Path) -> None:
    images = torch.randn(5, 4, 3).transpose(1, 2)  # no picture, not contiguous, not in [-1, 1]
    path = save_samples(images, tmp_path / "new" / "samples.safetensors", seed=0)
    assert torch.equal(load_file(path)["images"], images)


def test_samples_as_a_grid(tmp_path: Path) -> None:
    plain = read_pixels(save_samples(shade(4, 0.0), tmp_path / "new" / "samples.png", seed=0))
    said = read_pixels(
        save_samples(shade(4, 0.0), tmp_path / "said.png", 0, ["label 0", "label 1", "label 2", "label 3"])
    )
    assert said.shape[0] > plain.shape[0] and said.shape[1] == plain.shape[1] == 2 * 112 + 3 * 8
    assert read_pixels(save_samples(shade(1, 0.0, size=80), tmp_path / "large.png", seed=0)).shape == (80, 80, 3)


def test_samples_as_a_folder_are_named_by_their_seeds(tmp_path: Path) -> None:
    images = torch.cat([shade(1, -1.0, 3), shade(1, 0.0, 3), shade(1, 1.0, 3)])
    folder = save_samples(images, tmp_path / "new" / "folder", seed=41)
    assert sorted(path.name for path in folder.iterdir()) == ["000041.png", "000042.png", "000043.png"]
    for seed, value in ((41, 0), (42, 128), (43, 255)):
        with Image.open(folder / f"{seed:06d}.png") as picture:
            assert picture.size == (8, 8) and picture.getpixel((0, 0)) == (value,) * 3


def test_a_folder_loses_the_pictures_of_other_seeds_alone(tmp_path: Path) -> None:
    save_samples(shade(3, 0.0), tmp_path, seed=9)
    save_samples(shade(1, 0.0), tmp_path, seed=1_234_567)
    assert {path.name for path in tmp_path.iterdir()} == {"1234567.png"}
    mine = {"photo.png", "12345.png", "0123456.png", "000001.jpg", "000002.png.png"}
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / "000007.png").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        save_samples(torch.zeros(2, 4, 8, 8), tmp_path, seed=0)
    assert (tmp_path / "1234567.png").is_file()
    save_samples(shade(1, 0.0), tmp_path, seed=3)
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "000007.png", "000003.png"}


@pytest.mark.parametrize("name", ["new.png", "new.safetensors", "new", "deep/new.png"])
def test_new_outputs_may_be_written(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, overwrite=False)
    assert not (tmp_path / name).exists(), "checking writes nothing"


@pytest.mark.parametrize("name", ["there.png", "there.safetensors", "full"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, name: str) -> None:
    for file in ("there.png", "there.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"output=.*{name}': exists; .*overwrite"):
        check_output(tmp_path / name, overwrite=False)
    check_output(tmp_path / "empty", overwrite=False)
    check_output(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("name", ["images.jpg", "images.pt", "images.npz"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"give a .png, a .safetensors, or a folder"):
        check_output(tmp_path / name, overwrite=True)


def test_folder_with_the_name_of_a_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder.png': is a folder"):
        check_output(tmp_path / "folder.png", overwrite=True)


def test_file_in_the_way_of_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    # Overwriting a file without a suffix would have to remove the file to make the folder.
    (tmp_path / "file").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="output=.*file exists"):
            check_output(tmp_path / "file", overwrite=overwrite)
