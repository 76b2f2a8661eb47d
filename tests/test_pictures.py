"""Pictures of samples, read back by Pillow and numpy."""

import time

import numpy as np
import pytest
from PIL import Image

from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate.pictures import grid, png, write_grid, write_pictures, write_samples


def pictures(count: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_image_is_in_the_grid_in_its_place(tmp_path, channels, mode):
    images = pictures(5, 32, channels)
    write_grid(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == mode and picture.size == (3 * 66 + 2, 2 * 66 + 2)
        pixels = np.asarray(picture).reshape(134, 200, channels)
    for i, image in enumerate(images):
        top, left = 2 + 66 * (i // 3), 2 + 66 * (i % 3)
        cell = pixels[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(cell[::2, ::2], image)  # each pixel is four
        np.testing.assert_array_equal(cell[1::2, 1::2], image)
    assert np.all(pixels[68:, 134:] == 255)  # the place that is left
    assert np.all(pixels[:, :2] == 255) and np.all(pixels[-2:] == 255) and np.all(pixels[66:68] == 255)


def test_a_grid_has_the_columns_that_were_asked_for_and_small_images_can_be_read():
    assert grid(pictures(6, 8, 1), columns=6).shape == (68, 6 * 66 + 2, 1)
    assert grid(pictures(6, 8, 1), columns=1).shape == (6 * 66 + 2, 68, 1)
    assert grid(pictures(1, 100)).shape == (104, 104, 3)


def test_single_pictures_come_back_exactly(tmp_path):
    images = pictures(3, 5, 1)
    write_pictures(tmp_path, images, first=7)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["000007.png", "000008.png", "000009.png"]
    for path, image in zip(paths, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_have_the_layout_that_scoring_programs_read(tmp_path, channels):
    images = pictures(4, 6, channels)
    write_samples(tmp_path / "samples.npz", images)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as saved:
        assert saved.files == ["arr_0"]
        samples = saved["arr_0"]
    assert samples.dtype == np.uint8 and samples.shape == (4, 6, 6, 3) and samples.flags.c_contiguous
    for channel in range(3):
        np.testing.assert_array_equal(samples[..., channel], images[..., channel % channels])


def test_equal_images_are_equal_bytes_at_any_time(tmp_path, monkeypatch):
    images = pictures(4)
    write_samples(tmp_path / "a.npz", images)
    before = (tmp_path / "a.npz").read_bytes(), png(images[0])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e7)
    write_samples(tmp_path / "b.npz", images)
    assert ((tmp_path / "b.npz").read_bytes(), png(images[0])) == before


def test_what_is_no_picture_is_said(tmp_path):
    with pytest.raises(UserError, match="no images to show"):
        grid(pictures(0))
    for write in (write_grid, write_samples, write_pictures):
        with pytest.raises(UserError, match="1 channel or 3, not 4: latents must be decoded first"):
            write(tmp_path / "out", pictures(2, 8, 4))
    assert not list(tmp_path.iterdir())
