"""Reference images and label images: transparency, orientation, depth, fitting, damage."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from alignlab.data.decode import ClipError
from alignlab.data.images import read_image
from alignlab.data.resize import fit_reference


def test_transparency_becomes_the_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (6, 4), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 3, 4))
    image.save(tmp_path / "a.png")
    image_HWC, mask_HW = read_image(tmp_path / "a.png")
    assert mask_HW is not None and mask_HW[:, :3].all() and not mask_HW[:, 3:].any()
    assert image_HWC[0, 0].tolist() == [200, 0, 0] and image_HWC[0, 5].tolist() == [255] * 3

    image.convert("RGB").save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png")[1] is None


def test_photo_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg")[0].shape == (20, 10, 3)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    for name, reason in {
        "a.png": "cannot be read",
        "gone.png": "cannot be read",
        "deep.png": "more than 8 bits",
    }.items():
        with pytest.raises(ClipError, match=f"{name}.*{reason}"):
            read_image(tmp_path / name)


def test_reference_is_fitted_on_white() -> None:
    image_HWC = torch.full((20, 40, 3), 90, dtype=torch.uint8)
    fitted_HWC, mask_HW = fit_reference(image_HWC, None, (64, 64))
    assert fitted_HWC.shape == (64, 64, 3) and mask_HW.shape == (64, 64)
    assert mask_HW[16:48].all() and not mask_HW[:16].any() and not mask_HW[48:].any()
    assert (fitted_HWC[16:48] == 90).all() and (fitted_HWC[~mask_HW] == 255).all()


def test_reference_background_is_whitened() -> None:
    """Black surroundings must not leak into the edge of the subject."""
    image_HWC = torch.zeros(64, 64, 3, dtype=torch.uint8)
    mask_HW = torch.zeros(64, 64, dtype=torch.bool)
    image_HWC[16:48, 16:48], mask_HW[16:48, 16:48] = 200, True
    fitted_HWC, fitted_mask_HW = fit_reference(image_HWC, mask_HW, (32, 32))
    assert fitted_mask_HW.sum() == 16 * 16 and fitted_mask_HW[8:24, 8:24].all()
    assert (fitted_HWC >= 190).all() and (fitted_HWC[~fitted_mask_HW] == 255).all()
