"""Predictions are what the runtime itself says of the pixels that training would have seen."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from package_samples import CLASS_NAMES, IMAGE_SHAPE, contents, onnx_logits
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from understudy.data.decode import MAX_PIXELS, decode_into, read_header
from understudy.errors import DataError, InputError, ModelError
from understudy.package import picture as picture_module
from understudy.package import predict as predict_module
from understudy.package.manifest import Preprocessing
from understudy.package.picture import fitted, load_picture
from understudy.package.predict import predict, predict_arrays, predict_command
from understudy.package.reading import read_package
from understudy.package.statistics import softmax
from understudy.package.writing import write_package

HEIGHT, WIDTH = IMAGE_SHAPE[1:]
COLOR = Preprocessing(image_shape=IMAGE_SHAPE, color_order="RGB", resize="shorter_side_center_crop")
GREY = Preprocessing(
    image_shape=(1, HEIGHT, WIDTH), color_order="GRAY", resize="shorter_side_center_crop"
)


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def channels_last(picture):
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def decoded(path):
    header = read_header(path)
    pixels_CHW = np.empty((3, header.height, header.width), np.uint8)
    decode_into(pixels_CHW, path, resize=False)
    return channels_last(pixels_CHW)


def late_orientations(folder):
    """PNG files of the network's size whose orientation is not in an EXIF chunk of the header."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[0, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 3
    data = exif.tobytes()
    text, xmp = PngInfo(), PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="3"/>')
    late = saved(folder / "late.png", pixels)
    chunk = b"eXIf" + data.removeprefix(b"Exif\0\0")
    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    whole = late.read_bytes()
    late.write_bytes(whole[:-12] + chunk + whole[-12:])
    with Image.open(late) as image:
        assert image.getexif()[0x0112] == 3
    return [
        saved(folder / "text.png", pixels, pnginfo=text),
        saved(folder / "xmp.png", pixels, pnginfo=xmp),
        late,
    ]


def bomb(folder, side):
    """A PNG whose few bytes claim more pixels than are allowed."""
    path = folder / "bomb.png"
    Image.new("1", (side, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[20:24] = side.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.fixture
def files(tmp_path, pictures):
    """The pictures as PNG files of the network's size."""
    return [
        saved(tmp_path / f"{index}.png", channels_last(picture))
        for index, picture in enumerate(pictures)
    ]


class TestPredict:
    @pytest.mark.parametrize("precision", [None, "float32", "int8"])
    def test_the_answers_are_those_of_onnx_runtime(
        self, zip_package, artifacts, pictures, files, precision
    ):
        index = 1 if precision == "int8" else 0
        shares_NK = softmax(onnx_logits(artifacts[index].path, pictures))
        name = precision and f"onnx-{precision}"
        with read_package(zip_package) as package:
            found = predict(package, files, top=4, artifact=name)
        assert [one.picture for one in found] == [str(path) for path in files]
        for one, shares_K in zip(found, shares_NK, strict=True):
            assert one.changes == ()
            assert [g.class_index for g in one.guesses] == np.argsort(-shares_K).tolist()
            for guess in one.guesses:
                assert guess.class_name == CLASS_NAMES[guess.class_index]
                assert guess.probability == pytest.approx(shares_K[guess.class_index], abs=1e-6)
        assert len({one.guesses[0].class_index for one in found}) > 1

    def test_batches_do_not_matter(self, folder_package, files, monkeypatch):
        package = read_package(folder_package)
        whole = predict(package, files)
        monkeypatch.setattr(predict_module, "BATCH_SIZE", 3)
        for one, other in zip(whole, predict(package, files), strict=True):
            assert one.picture == other.picture
            for guess, again in zip(one.guesses, other.guesses, strict=True):
                assert guess.probability == pytest.approx(again.probability, abs=1e-5)

    @pytest.mark.parametrize("top", [1, 3, 4, 99])
    def test_top(self, folder_package, files, top):
        (found,) = predict(read_package(folder_package), files[:1], top=top)
        assert len(found.guesses) == min(top, 4)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"top": 0}, "top is 0; expected at least 1"),
            ({"artifact": "c-int8"}, "holds no artifact 'c-int8'"),
            ({"pictures": []}, "there are no pictures"),
        ],
    )
    def test_what_cannot_be_asked(self, folder_package, files, changes, message):
        asked = {"pictures": files[:1], **changes}
        with pytest.raises(InputError, match=message):
            predict(read_package(folder_package), **asked)

    def test_another_number_of_classes(self, artifacts, packed, tmp_path, files):
        wrong = dataclasses.replace(packed, class_names=CLASS_NAMES[:3])
        write_package(tmp_path / "p", artifacts, wrong)
        with pytest.raises(ModelError, match=r"logits of shape \(1, 4\); expected \(1, 3\)"):
            predict(read_package(tmp_path / "p"), files[:1])

    def test_another_image_shape(self, artifacts, packed, tmp_path, files):
        wrong = dataclasses.replace(packed, image_shape=(3, 20, 20))
        write_package(tmp_path / "p", artifacts, wrong)
        with pytest.raises(ModelError, match=r"does not run on pictures of \(3, 20, 20\)"):
            predict(read_package(tmp_path / "p"), files[:1])

    def test_a_file_that_its_runtime_cannot_load(self, artifacts, packed, tmp_path, files):
        (tmp_path / "student.onnx").write_bytes(b"not a model")
        broken = dataclasses.replace(artifacts[0], folder=tmp_path)
        write_package(tmp_path / "p", [broken], packed)
        with pytest.raises(InputError, match=r"onnx cannot load student.onnx"):
            predict(read_package(tmp_path / "p"), files[:1])

    def test_an_artifact_that_nothing_in_python_opens(
        self, artifacts, packed, tmp_path, files, monkeypatch
    ):
        (tmp_path / "student.x").write_bytes(b"")
        other = dataclasses.replace(
            artifacts[0], target="abacus", folder=tmp_path, files=("student.x",)
        )
        write_package(tmp_path / "p", [*artifacts, other], packed)
        package = read_package(tmp_path / "p")
        with pytest.raises(InputError, match=r"abacus-float32 .*one of onnx-float32, onnx-int8"):
            predict(package, files[:1], artifact="abacus-float32")

    def test_a_runtime_that_is_not_installed(self, folder_package, files, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(InputError, match="Run: pip install onnxruntime numpy"):
            predict(read_package(folder_package), files[:1])

    def test_no_code_of_the_package_is_run(self, artifacts, packed, tmp_path, files, monkeypatch):
        """A package whose script does harm, sealed by one who knows how."""
        scripts = tmp_path / "scripts"
        scripts.mkdir()
        (scripts / "onnx.py").write_text("raise SystemExit('code of the package was run')")
        with monkeypatch.context() as patch:
            patch.setattr("understudy.package.writing.RUNTIMES_FOLDER", scripts)
            write_package(tmp_path / "p", artifacts, packed)
        package = read_package(tmp_path / "p")
        assert "SystemExit" in (package.folder / "runtimes" / "onnx.py").read_text()
        assert len(predict(package, files)) == len(files)


class TestArrays:
    def test_orders_and_layouts_mean_the_same_pixels(self, folder_package, pictures):
        package = read_package(folder_package)
        found = [
            predict_arrays(package, pictures, order="RGB"),
            predict_arrays(package, pictures[:, ::-1], order="BGR"),
            predict_arrays(package, pictures.transpose(0, 2, 3, 1), order="RGB", layout="NHWC"),
        ]
        assert [one.guesses for one in found[0]] == [one.guesses for one in found[1]]
        assert [one.guesses for one in found[0]] == [one.guesses for one in found[2]]
        assert found[1][0].changes == ("channels turned from BGR to RGB",)
        wrong = predict_arrays(package, pictures, order="BGR")
        assert [one.guesses for one in found[0]] != [one.guesses for one in wrong]

    def test_the_order_has_to_be_said(self, folder_package, pictures):
        with pytest.raises(TypeError, match="order"):
            predict_arrays(read_package(folder_package), pictures)

    @pytest.mark.parametrize(
        ("images", "words", "message"),
        [
            (np.zeros((1, 3, HEIGHT, WIDTH), np.float32), {}, "float32 of shape"),
            (np.zeros((3, HEIGHT, WIDTH), np.uint8), {}, r"uint8 of shape \(n, 3, 16, 12\)"),
            (np.zeros((1, 3, WIDTH, HEIGHT), np.uint8), {}, r"shape \(1, 3, 12, 16\)"),
            (np.zeros((0, 3, HEIGHT, WIDTH), np.uint8), {}, "n at least 1"),
            (np.zeros((1, 1, HEIGHT, WIDTH), np.uint8), {}, r"shape \(1, 1, 16, 12\)"),
            (np.zeros((1, 3, HEIGHT, WIDTH), np.uint8), {"order": "GRAY"}, "RGB or BGR"),
            (np.zeros((1, 3, HEIGHT, WIDTH), np.uint8), {"order": "rgb"}, "order is 'rgb'"),
            (np.zeros((1, 3, HEIGHT, WIDTH), np.uint8), {"layout": "CHW"}, "NCHW or NHWC"),
        ],
    )
    def test_what_does_not_fit(self, folder_package, images, words, message):
        with pytest.raises(DataError, match=message):
            predict_arrays(read_package(folder_package), images, **{"order": "RGB", **words})


class TestPictures:
    def test_a_picture_of_the_right_size_is_untouched(self, files, pictures):
        for path, pixels_CHW in zip(files, pictures, strict=True):
            loaded = load_picture(path, COLOR)
            assert loaded.changes == ()
            np.testing.assert_array_equal(loaded.pixels_CHW, pixels_CHW)

    def test_other_sizes_are_cut_from_the_centre(self, tmp_path):
        pixels = np.zeros((2 * HEIGHT, 6 * WIDTH, 3), np.uint8)
        pixels[:, 2 * WIDTH : 4 * WIDTH] = 200
        path = saved(tmp_path / "wide.png", pixels)
        loaded = load_picture(path, COLOR)
        # The filter sees a little of what lies beside the cut, as if it were resized first.
        assert (loaded.pixels_CHW[..., 1:-1] == 200).all()
        assert (loaded.pixels_CHW > 150).all()
        assert loaded.original_size == (32, 72)
        assert loaded.changes == ("resized from 32x72 to 16x12 (shorter side, centre crop)",)
        stretched = load_picture(path, COLOR.model_copy(update={"resize": "stretch"}))
        assert stretched.pixels_CHW[0, 8].tolist()[:: WIDTH - 1] == [0, 0]
        assert stretched.changes == ("resized from 32x72 to 16x12 (stretched)",)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (16, 12), (7, 300)])
    @pytest.mark.parametrize("preprocessing", [COLOR, GREY])
    def test_any_size_can_be_fitted(self, shape, preprocessing):
        pixels_CHW = np.full((preprocessing.image_shape[0], *shape), 77, np.uint8)
        found = fitted(pixels_CHW, preprocessing)
        assert found.shape == preprocessing.image_shape
        assert (found == 77).all()

    def test_grey_to_colour_and_back(self, tmp_path):
        grey = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
        path = saved(tmp_path / "grey.png", grey)
        loaded = load_picture(path, COLOR)
        np.testing.assert_array_equal(loaded.pixels_CHW, [grey] * 3)
        assert loaded.changes == ("L converted to RGB",)
        assert load_picture(path, GREY).changes == ()
        color = saved(tmp_path / "color.png", np.stack([grey] * 3, axis=-1))
        np.testing.assert_array_equal(load_picture(color, GREY).pixels_CHW, [grey])
        assert load_picture(color, GREY).changes == ("RGB converted to GRAY",)

    def test_palettes_are_looked_up(self, tmp_path, pictures):
        image = Image.fromarray(channels_last(pictures[0])).quantize(8)
        image.save(tmp_path / "palette.png")
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        loaded = load_picture(tmp_path / "palette.png", COLOR)
        np.testing.assert_array_equal(loaded.pixels_CHW, expected)

    def test_transparency_is_laid_on_black(self, tmp_path):
        pixels = np.full((HEIGHT, WIDTH, 4), 200, np.uint8)
        pixels[..., 3] = 0
        pixels[0, 0, 3] = 255
        loaded = load_picture(saved(tmp_path / "clear.png", pixels), COLOR)
        assert loaded.pixels_CHW[:, 0, 0].tolist() == [200, 200, 200]
        assert loaded.pixels_CHW.sum() == 600
        assert loaded.changes == ("transparency laid on black",)

    def test_16_bits_are_scaled_and_not_cut(self, tmp_path):
        values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
        loaded = load_picture(saved(tmp_path / "deep.png", values), GREY)
        np.testing.assert_allclose(loaded.pixels_CHW[0], values / 257, atol=0.5)
        assert loaded.changes == ("16-bit values scaled to 8 bits",)

    def test_cmyk_is_converted(self, tmp_path):
        image = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
        image.save(tmp_path / "print.tiff")
        loaded = load_picture(tmp_path / "print.tiff", COLOR)
        assert loaded.pixels_CHW[:, 0, 0].tolist() == [255, 0, 0]
        assert loaded.changes == ("CMYK converted to RGB",)

    @pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.webp", "p.avif"])
    def test_exif_turns_a_picture_upright(self, tmp_path, name):
        pixels = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
        pixels[: WIDTH // 2] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # as shown, the stored top is on the right
        options = {"lossless": True} if name == "p.webp" else {}
        path = saved(tmp_path / name, pixels, exif=exif, **options)
        loaded = load_picture(path, COLOR)
        assert loaded.original_size == (HEIGHT, WIDTH)
        assert loaded.changes == ("turned upright from EXIF orientation 6",)
        assert loaded.pixels_CHW[0, :, 0].max() < 10
        assert loaded.pixels_CHW[0, :, -1].min() > 245

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
    @pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
    def test_tiff_of_every_mode_is_upright(self, tmp_path, pictures, mode, orientation):
        image = Image.fromarray(channels_last(pictures[0]))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
        image = image.convert(mode)
        image.save(tmp_path / "plain.tiff")
        image.save(tmp_path / "turned.tiff", tiffinfo={0x0112: orientation})
        turned = {
            1: np.asarray,
            3: lambda pixels: pixels[::-1, ::-1],
            5: lambda pixels: pixels.swapaxes(0, 1),
            6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
            7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
            8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
        }[orientation]
        plain_HWC = decoded(tmp_path / "plain.tiff")
        np.testing.assert_array_equal(decoded(tmp_path / "turned.tiff"), turned(plain_HWC))

    def test_orientation_behind_the_pixels_of_a_png_does_not_count(self, tmp_path):
        for path in late_orientations(tmp_path):
            loaded = load_picture(path, COLOR)
            assert loaded.changes == ()
            assert (loaded.pixels_CHW[:, 0, 0] == 200).all()

    def test_the_transparent_value_of_16_bits_is_black(self, tmp_path):
        values = np.full((HEIGHT, WIDTH), 51400, np.uint16)
        values[0, 0] = 3000
        loaded = load_picture(saved(tmp_path / "p.png", values, transparency=3000), GREY)
        assert loaded.pixels_CHW[0, 0, 0] == 0
        assert (loaded.pixels_CHW.reshape(-1)[1:] == 200).all()
        assert loaded.changes == ("16-bit values scaled to 8 bits", "transparency laid on black")

    def test_the_first_frame_of_several(self, tmp_path):
        frames = [Image.new("L", (WIDTH, HEIGHT), value) for value in (10, 200)]
        frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
        loaded = load_picture(tmp_path / "two.gif", GREY)
        assert (loaded.pixels_CHW == 10).all()
        assert "first frame taken" in loaded.changes


class TestBadPictures:
    def test_all_are_said_at_once(self, folder_package, tmp_path, files):
        (tmp_path / "text.png").write_text("not a picture")
        bad = [tmp_path / "none.png", tmp_path / "text.png", tmp_path]
        with pytest.raises(DataError) as caught:
            predict(read_package(folder_package), [files[0], *bad])
        first, second, third = caught.value.problems
        assert "there is no file" in first
        assert "text.png cannot be used: no known picture format" in second
        assert "is not a file" in third

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp", "gif", "bmp"])
    def test_every_cut_is_an_error_or_the_whole_picture(self, tmp_path, pictures, suffix):
        large = np.kron(channels_last(pictures[0]), np.ones((4, 4, 1), np.uint8))
        whole = saved(tmp_path / f"whole.{suffix}", large).read_bytes()
        path = tmp_path / f"cut.{suffix}"
        for share in (0.0, 0.01, 0.2, 0.5, 0.9):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(DataError, match=r"cut\.\w+ cannot be used"):
                load_picture(path, COLOR)

    @pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 10, 30_000])
    def test_a_bomb_is_refused_by_its_header(self, tmp_path, side):
        path = bomb(tmp_path, side)
        with pytest.raises(DataError, match=r"bomb.png cannot be used: .*(allowed|exceeds limit)"):
            load_picture(path, COLOR)

    def test_a_huge_file_is_not_opened(self, tmp_path):
        with (tmp_path / "huge.png").open("wb") as file:
            file.truncate(picture_module.MAX_FILE_BYTES + 1)
        with pytest.raises(DataError, match="expected a picture file of at most 256 MB"):
            load_picture(tmp_path / "huge.png", COLOR)

    def test_a_name_that_no_file_can_have(self, tmp_path):
        with pytest.raises(DataError, match=r"cannot be looked at \(File name too long\)"):
            load_picture(tmp_path / ("x" * 300), COLOR)

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(DataError, match="is not a file"):
            load_picture(tmp_path / "pipe.png", COLOR)

    def test_formats_that_run_other_programs_are_refused(self, tmp_path):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "p.eps")
        (tmp_path / "p.eps").rename(tmp_path / "p.png")
        with pytest.raises(DataError, match="its format EPS is not read here"):
            load_picture(tmp_path / "p.png", COLOR)

    def test_floating_point_pixels_are_refused(self, tmp_path):
        path = saved(tmp_path / "f.tiff", np.zeros((HEIGHT, WIDTH), np.float32))
        with pytest.raises(DataError, match="floating-point pixels"):
            load_picture(path, GREY)

    def test_random_damage_is_never_a_traceback(self, tmp_path, files):
        random = np.random.default_rng(5)
        whole = files[0].read_bytes()
        num_refused = num_read = 0
        for _ in range(100):
            data = bytearray(whole)
            for position in random.integers(0, len(data), 4):
                data[position] = random.integers(256)
            path = tmp_path / "damaged.png"
            path.write_bytes(data)
            try:
                picture = load_picture(path, COLOR)
            except DataError as error:
                num_refused += "damaged.png" in str(error)
            else:
                num_read += 1
                assert picture.pixels_CHW.shape == load_picture(files[0], COLOR).pixels_CHW.shape
        assert num_refused + num_read == 100
        assert num_refused > 0


class TestCommand:
    def test_text(self, zip_package, files, tmp_path):
        other = saved(tmp_path / "large.png", np.zeros((64, 64, 3), np.uint8))
        text = predict_command(
            str(zip_package), [files[0], other], top=2, artifact=None, as_json=False
        )
        lines = text.splitlines()
        assert lines[0].startswith(f"{files[0]}: ")
        assert lines[0].count("%") == 2
        assert lines[2] == "  resized from 64x64 to 16x12 (shorter side, centre crop)"

    def test_json(self, zip_package, files, artifacts, pictures):
        text = predict_command(
            str(zip_package), files[:2], top=1, artifact="onnx-int8", as_json=True
        )
        values = json.loads(text)
        assert (values["package"], values["version"]) == ("garden", "1.2")
        assert values["artifact"] == "onnx-int8"
        expected = onnx_logits(artifacts[1].path, pictures[:2]).argmax(axis=1)
        for row, one in enumerate(values["predictions"]):
            assert one["picture"] == str(files[row])
            assert one["top"][0]["class_index"] == expected[row]
            assert one["original_size"] == [HEIGHT, WIDTH]

    def test_names_cannot_steer_the_terminal(self, zip_package, pictures, tmp_path):
        path = saved(tmp_path / "a\x1b[2Jb.png", channels_last(pictures[0]))
        text = predict_command(str(zip_package), [path], top=1, artifact=None, as_json=False)
        assert "\x1b" not in text
        assert r"a\x1b[2Jb.png" in text

    def understudy(self, *arguments):
        """Run the command on a terminal that knows ASCII alone."""
        return subprocess.run(
            [sys.executable, "-m", "understudy", "predict", *map(str, arguments)],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )

    def test_class_names_reach_any_output(self, zip_package, files):
        done = self.understudy(zip_package, files[0], "--top", "4")
        assert done.returncode == 0, done.stderr
        assert rb"gr\xf6\xdfer" in done.stdout

    def test_errors_cannot_steer_the_terminal(self, zip_package, tmp_path):
        done = self.understudy(zip_package, tmp_path / "a\x1b[2Jb.png", "y" * 5000)
        assert done.returncode == 2
        first, second = done.stderr.splitlines()
        assert first.startswith(b"error: there is no file ")
        assert rb"a\x1b[2Jb.png" in first
        assert second.startswith(b"error: yyy")
        assert len(second) < 4100

    def test_it_works_where_only_the_runtime_is_installed(self, zip_package, files):
        """Nothing that comes with training can be imported in this process."""
        code = f"""
import sys
heavy = ["torch", "datasets", "pandas", "pyarrow", "onnx", "onnxscript", "jinja2", "scipy",
         "sklearn", "zarr", "kornia", "psutil", "plotly", "lightning_fabric"]
for name in heavy:
    sys.modules[name] = None
from pathlib import Path
from understudy.package.predict import predict_command
print(predict_command({str(zip_package)!r}, [Path({str(files[0])!r})], top=1, artifact=None,
                      as_json=False))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{files[0]}: ")


class TestRunner:
    """run.py, really run, against ``predict``."""

    def run(self, package, paths):
        script = package / "run.py"
        # -I: nothing of this installation's paths or environment but the installed packages.
        return subprocess.run(
            [sys.executable, "-I", str(script), *map(str, paths)],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )

    def variety(self, folder, pictures):
        """Pictures of every kind that ``Preprocessing`` says something of."""
        color = channels_last(pictures[0])
        large = np.kron(color, np.ones((5, 7, 1), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 8
        clear = np.dstack([color, color[..., 0]])
        deep = large[..., 0].astype(np.uint16) * 257
        Image.fromarray(large).quantize(16).save(folder / "palette.png")
        turned = {"tiffinfo": {0x0112: 6}}
        return [
            *late_orientations(folder),
            saved(folder / "turned.avif", large, exif=exif),
            saved(folder / "turned.png", large, exif=exif),
            saved(folder / "turned.tiff", large[..., 1], **turned),
            saved(folder / "clear.tiff", np.kron(clear, np.ones((2, 3, 1), np.uint8)), **turned),
            saved(folder / "one_clear.png", deep, transparency=int(deep[0, 0])),
            folder / "palette.png",
            saved(folder / "color.png", color),
            saved(folder / "large.png", large),
            saved(folder / "grey.png", large[..., 1]),
            saved(folder / "clear.png", clear),
            saved(folder / "deep.png", deep),
            saved(folder / "turned.jpg", large, exif=exif),
        ]

    @pytest.mark.parametrize("resize", ["shorter_side_center_crop", "stretch"])
    def test_it_says_what_predict_says(self, artifacts, packed, pictures, tmp_path, resize):
        package = tmp_path / "p"
        write_package(
            package,
            artifacts,
            dataclasses.replace(packed, resize=resize, default_artifact="onnx-int8"),
        )
        paths = self.variety(tmp_path, pictures)
        done = self.run(package, paths)
        assert done.returncode == 0, done.stderr
        expected = [
            f"{one.picture}: "
            + ", ".join(f"{guess.class_name} {guess.probability:.1%}" for guess in one.guesses)
            for one in predict(read_package(package), paths, top=3)
        ]
        assert done.stdout.splitlines() == expected
        read_package(package)

    def test_it_works_in_grey(self, tmp_path):
        import torch
        from torch import nn

        from understudy.export.target import ExportSource
        from understudy.export.targets import onnx

        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
        artifact = onnx.export(
            ExportSource(model, (1, 8, 8), CLASS_NAMES), tmp_path, precision="float32"
        )
        grey = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
        made = contents(grey[None, None], np.zeros((1, 4)), image_shape=(1, 8, 8))
        write_package(tmp_path / "p", [artifact], made)
        path = saved(tmp_path / "grey.png", grey)
        (found,) = predict(read_package(tmp_path / "p"), [path])
        done = self.run(tmp_path / "p", [path])
        assert done.stdout.startswith(f"{path}: {found.guesses[0].class_name} ")

    def refused(self, package, *paths):
        """Return the one line that it says before it ends with code 2."""
        done = self.run(package, paths)
        assert done.returncode == 2, done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr.strip()

    def test_a_changed_byte_of_the_network_is_refused(self, folder_package, files, tmp_path):
        package = tmp_path / "p"
        shutil.copytree(folder_package, package)
        model = package / "artifacts" / "onnx-float32" / "student.onnx"
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        assert self.refused(package, files[0]) == (
            "the package cannot be used: artifacts/onnx-float32/student.onnx was changed; "
            "expected the files of the manifest, unchanged. Get the package again."
        )
        model.unlink()
        assert "student.onnx" in self.refused(package, files[0])
        (package / "manifest.json").write_text("{")
        assert self.refused(package, files[0]).startswith("the package cannot be used: ")

    @pytest.mark.parametrize(
        "change",
        [
            lambda values: values["class_names"].reverse(),
            lambda values: values["preprocessing"].update(resize="stretch"),
            lambda values: values.pop("content_sha256"),
        ],
    )
    def test_a_changed_manifest_is_refused(self, folder_package, files, tmp_path, change):
        package = shutil.copytree(folder_package, tmp_path / "p")
        values = json.loads((package / "manifest.json").read_text())
        change(values)
        (package / "manifest.json").write_text(json.dumps(values))
        said = self.refused(package, files[0])
        assert said.startswith("the package cannot be used: ")
        assert "manifest.json was changed; expected" in said or "content_sha256" in said

    def test_another_number_of_classes_is_refused(self, artifacts, packed, tmp_path, files):
        for names in (CLASS_NAMES[:3], (*CLASS_NAMES, "more")):
            wrong = dataclasses.replace(packed, class_names=names)
            write_package(tmp_path / "p", artifacts, wrong, overwrite=True)
            said = self.refused(tmp_path / "p", files[0])
            assert f"the network's answer is not {len(names)} finite numbers; expected" in said

    def test_an_answer_that_is_not_finite_is_refused(self, artifacts, packed, tmp_path, files):
        import onnx
        from onnx import numpy_helper

        broken = onnx.load(artifacts[0].path)
        last = next(one for one in broken.graph.initializer if one.data_type == 1)
        values = np.full_like(numpy_helper.to_array(last), np.nan)
        last.CopyFrom(numpy_helper.from_array(values, last.name))
        onnx.save(broken, tmp_path / "student.onnx")
        write_package(tmp_path / "p", [dataclasses.replace(artifacts[0], folder=tmp_path)], packed)
        assert "finite numbers" in self.refused(tmp_path / "p", files[0])

    def test_it_says_how_it_is_used(self, folder_package):
        assert self.refused(folder_package) == "usage: python run.py PICTURE ..."

    def test_what_predict_refuses_is_refused(self, folder_package, tmp_path, pictures):
        image = Image.fromarray(channels_last(pictures[0]))
        image.save(tmp_path / "p.eps")
        image.save(tmp_path / "p.pcx")
        saved(tmp_path / "p.tiff", np.zeros((HEIGHT, WIDTH), np.float32))
        for name in ("p.eps", "p.pcx", "p.tiff"):
            with pytest.raises(DataError):
                load_picture(tmp_path / name, COLOR)
            said = self.refused(folder_package, tmp_path / name)
            assert "floating-point" in said if name == "p.tiff" else "cannot identify" in said
            assert said.endswith("Save it again as PNG or JPEG.")

    def test_class_names_reach_any_output(self, folder_package, files):
        done = subprocess.run(
            [sys.executable, str(folder_package / "run.py"), *map(str, files)],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0, done.stderr
        assert rb"gr\xf6\xdfer" in done.stdout

    # Of fewer pixels than about 179 million Pillow by itself only warns.
    @pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 10, 30_000])
    def test_a_bomb_is_refused(self, folder_package, tmp_path, side):
        path = bomb(tmp_path, side)
        said = self.refused(folder_package, path)
        assert said.startswith(f"{path} cannot be used: Image size ({side * side} pixels) exceeds")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("missing.png", "No such file"),
            ("words.png", "cannot identify image file"),
            ("half.png", "truncated"),
            ("broken.png", ""),
        ],
    )
    def test_a_picture_that_cannot_be_used_is_named(
        self, folder_package, files, tmp_path, name, reason
    ):
        whole = files[0].read_bytes()
        (tmp_path / "words.png").write_text("just some words")
        (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "broken.png").write_bytes(whole[:60] + bytes(40) + whole[100:])
        said = self.refused(folder_package, files[0], tmp_path / name)
        assert said.startswith(f"{tmp_path / name} cannot be used: ")
        assert reason in said
        assert "Traceback" not in said

    def test_it_is_short(self, folder_package):
        assert len((folder_package / "run.py").read_text().splitlines()) <= 72


def test_the_package_part_of_the_tree_is_light():
    folder = Path(predict_module.__file__).parent
    for path in folder.rglob("*.py"):
        assert "import torch" not in path.read_text()
