"""Pictures: their axes and places as ITK has them, colours as grey, broken ones by name."""

import numpy as np
import pytest

from monai_lm.apps.info import describe_file
from monai_lm.io.images import Image
from monai_lm.io.pictures import load_picture

pictures = pytest.importorskip("PIL.Image", reason="Pillow, of the report extra, is not installed")

COLORS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
GREY = COLORS @ np.array([0.299, 0.587, 0.114])


def save(path, values, **options):
    pictures.fromarray(values).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options", "edge"),
    [
        ("p.png", {}, 1.0),
        ("p.png", {"dpi": (300, 300)}, 1.0),
        ("p.tif", {}, 1.0),
        ("p.tiff", {"dpi": (300, 150)}, 25.4 / 300),
        ("p.JPG", {"dpi": (300, 300)}, 25.4 / 300),
        ("p.jpeg", {}, 1.0),
    ],
)
def test_a_picture_lies_where_itk_has_it(tmp_path, name, options, edge):
    image = Image(save(tmp_path / name, COLORS, **options))
    assert image.grid.size == (30, 20)
    assert image.grid.spacing[0] == pytest.approx(edge)
    assert image.is_measured == (edge != 1.0)
    assert ("assumed" in describe_file(tmp_path / name)["spacing (mm)"]) == (edge == 1.0)
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, of the itk extra, is not installed")
    theirs = sitk.ReadImage(str(tmp_path / name))
    assert image.grid.spacing[:2] == pytest.approx(theirs.GetSpacing())
    place = theirs.TransformIndexToPhysicalPoint((7, 3))
    assert (image.grid.affine @ [7, 3, 0, 1])[:2] == pytest.approx([-place[0], -place[1]])
    assert float(image.data[0, 0, 7, 3]) == pytest.approx(
        np.dot(theirs[7, 3], [0.299, 0.587, 0.114]), abs=0.01 if name.startswith("p.p") else 2.0
    )


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P", "L", "I;16", "F", "1"])
def test_every_kind_of_pixel_is_read(tmp_path, kind):
    known = GREY
    if kind in ("RGB", "RGBA"):
        values = pictures.fromarray(COLORS).convert(kind)
    elif kind in ("I;16", "F"):
        known = (GREY * 200).round()
        values = pictures.fromarray(known.astype(np.uint16 if kind == "I;16" else np.float32))
    else:
        known = 255.0 * (GREY > 128) if kind == "1" else GREY.round()
        values = pictures.fromarray(known.astype(np.uint8)).convert(kind)
    values.save(tmp_path / "p.tif")
    data, affine = load_picture(tmp_path / "p.tif")
    assert data.dtype == np.float32
    np.testing.assert_allclose(data[:, :, 0].T, known, atol=0.01)
    np.testing.assert_array_equal(affine, np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.jpg"])
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path, name):
    whole = save(tmp_path / name, COLORS).read_bytes()
    for content in (b"", b"a letter", whole[: len(whole) // 2], whole[:20]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} must be a whole PNG, TIFF or JPEG picture, got"):
            Image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        Image(tmp_path / f"absent_{name}")


def test_several_pictures_and_numbers_that_are_none_are_refused(tmp_path):
    first = pictures.fromarray(COLORS)
    first.save(tmp_path / "p.tif", save_all=True, append_images=[first, first])
    with pytest.raises(ValueError, match=r"p.tif must hold one picture, got 3"):
        Image(tmp_path / "p.tif")
    save(tmp_path / "n.tif", np.full((5, 6), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"n.tif must be finite, got 30 NaN or infinite values; np.nan_to_num makes"):
        Image(tmp_path / "n.tif")


@pytest.mark.parametrize("name", ["p.png", "p.tif"])
def test_the_labels_of_a_palette_are_its_numbers(tmp_path, name):
    labels = np.random.default_rng(1).integers(0, 4, (20, 30), np.uint8)
    picture = pictures.fromarray(labels).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 200, 90, 0, 200, 90])  # two of one colour
    picture.putdata(labels.flatten().tolist())
    picture.save(tmp_path / name)
    np.testing.assert_array_equal(Image(tmp_path / name, label=True).data[0, 0].T, labels)
    save(tmp_path / name, labels)
    np.testing.assert_array_equal(Image(tmp_path / name, label=True).data[0, 0].T, labels)


def test_colours_and_jpeg_are_no_labels(tmp_path):
    with pytest.raises(ValueError, match=r"p.png must hold labels, .* got colours \(RGB\)"):
        Image(save(tmp_path / "p.png", COLORS), label=True)
    with pytest.raises(ValueError, match=r"p.jpg must hold labels, .* got JPEG, which changes numbers"):
        Image(save(tmp_path / "p.jpg", COLORS[..., 0]), label=True)


def test_info_knows_a_picture(tmp_path):
    found = describe_file(save(tmp_path / "p.png", COLORS))
    assert (found["kind"], found["size"], found["orientation"]) == ("image", "30 20 1", "LPS")
