"""The runner in C: compiled, run, and given every picture that it must refuse."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
from package_samples import CLASS_NAMES, Files, contents, onnx_logits
from PIL import Image

from understudy.errors import InputError, MissingExtraError
from understudy.package.predict import predict_arrays
from understudy.package.reading import read_package
from understudy.package.statistics import softmax
from understudy.package.writing import write_package

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or shutil.which("make") is None, reason="needs make and a C compiler"
)
STRICT = "-O1 -Wall -Wextra -Wpedantic -Werror -Wconversion -Wno-sign-conversion"
SANITIZED = f"{STRICT} -fsanitize=address,undefined -fno-sanitize-recover=all"

HEADER = """
#include <stddef.h>
int understudy_classify(const float *pixels_chw, size_t num_pixels, float *logits,
                        size_t num_logits);
"""
# Class k answers with what it sees of channel k: enough to tell a wrong order of bytes.
STUDENT = """
#include <math.h>
#include "student.h"
int understudy_classify(const float *pixels_chw, size_t num_pixels, float *logits,
                        size_t num_logits)
{
    size_t area = num_pixels / CHANNELS;
    if (num_logits != 4 || num_pixels != CHANNELS * 6)
        return 1;
    if (pixels_chw[0] == 1.0f && pixels_chw[1] == 0.0f)
        return 7;
    for (size_t k = 0; k < num_logits; k++) {
        logits[k] = (float)k / 8;
        for (size_t i = 0; i < area && k < CHANNELS; i++)
            logits[k] += pixels_chw[k * area + i] * (float)(i + 1);
    }
    if (pixels_chw[0] == 1.0f && pixels_chw[1] == 1.0f)
        logits[2] = NAN;
    return 0;
}
"""


def made(folder, num_channels, **changes):
    """A package of a hand-written student that takes 2x3 pictures, and its built runner."""
    source = folder / "source"
    source.mkdir()
    (source / "student.c").write_text(STUDENT.replace("CHANNELS", str(num_channels)))
    (source / "student.h").write_text(HEADER)
    files = Files("c", "float32", source, ("student.c", "student.h"))
    pictures = np.zeros((1, num_channels, 2, 3), np.uint8)
    given = contents(
        pictures, np.zeros((1, 4)), image_shape=(num_channels, 2, 3), measured={}, **changes
    )
    write_package(folder / "p", [files], given)
    return built(folder / "p")


def built(package, flags=SANITIZED):
    done = subprocess.run(
        ["make", "-C", str(package / "run_c"), f"CFLAGS={flags}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return package / "run_c" / "classify"


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    return made(tmp_path_factory.mktemp("color"), 3)


def run(program, *arguments):
    return subprocess.run([str(program), *arguments], capture_output=True, check=False)


def written(tmp_path, data):
    path = tmp_path / "picture.ppm"
    path.write_bytes(data)
    return str(path)


PIXELS = bytes([10, 20, 30] * 6)


def test_the_answer_is_that_of_the_formula(classify, tmp_path):
    random = np.random.default_rng(0)
    pixels_HWC = random.integers(0, 255, (2, 3, 3)).astype(np.uint8)
    path = tmp_path / "p.ppm"
    Image.fromarray(pixels_HWC).save(path)
    pixels_CP = pixels_HWC.transpose(2, 0, 1).reshape(3, 6) / 255
    logits_K = np.arange(4) / 8
    logits_K[:3] += (pixels_CP * np.arange(1, 7)).sum(axis=1)
    shares_K = softmax(logits_K[None])[0]
    done = run(classify, str(path), "4")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    order = np.argsort(-shares_K)
    assert [name for _, name in rows] == [CLASS_NAMES[k] for k in order]
    assert [float(share) for share, _ in rows] == pytest.approx(shares_K[order], abs=2e-6)
    assert len(run(classify, str(path)).stdout.splitlines()) == 3
    assert len(run(classify, str(path), "99").stdout.splitlines()) == 4


@pytest.mark.parametrize(
    "header",
    [
        b"P6\n3 2\n255\n",
        b"P6 3 2 255 ",
        b"P6\t3\r\n# a comment 9 9\n2 #c\r255\n",
        b"P6\n03 2 255\n",
    ],
)
def test_headers_of_all_styles(classify, tmp_path, header):
    done = run(classify, written(tmp_path, header + PIXELS))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"", 4, b"P6"),
        (b"P", 4, b"P6"),
        (b"P5\n3 2\n255\n" + PIXELS, 4, b"P6"),
        (b"P3\n3 2\n255\n" + PIXELS, 4, b"P6"),
        (b"P6\n3", 4, b"P6"),
        (b"P6\n3 2", 4, b"P6"),
        (b"P6\n# no end", 4, b"P6"),
        (b"P6\n-3 2\n255\n" + PIXELS, 4, b"P6"),
        (b"P6\n3x 2\n255\n" + PIXELS, 4, b"P6"),
        (b"P6\n99999999999999999999 2\n255\n" + PIXELS, 4, b"P6"),
        (b"P6\n2 3\n255\n" + PIXELS, 5, b"expected 3x2"),
        (b"P6\n0 0\n255\n", 5, b"expected 3x2"),
        (b"P6\n1000000 1000000\n255\n", 5, b"expected 3x2"),
        (b"P6\n3 2\n65535\n" + PIXELS * 2, 6, b"expected 255"),
        (b"P6\n3 2\n1\n" + PIXELS, 6, b"expected 255"),
        (b"P6\n3 2\n255\n", 7, b"ends early"),
        (b"P6\n3 2\n255\n" + PIXELS[:-1], 7, b"ends early"),
        (b"P6\n3 2\n255\n" + PIXELS + b"\n", 8, b"behind the pixels"),
        (b"P6\n3 2\n255\n\xff\0\0\0" + PIXELS[4:], 1, b"the student failed with error 7"),
        (b"P6\n3 2\n255\n\xff\0\0\xff" + PIXELS[4:], 9, b"NaN or infinity"),
    ],
)
def test_bad_pictures(classify, tmp_path, data, code, message):
    done = run(classify, written(tmp_path, data))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == b""


@pytest.mark.parametrize("arguments", [[], ["a", "0"], ["a", "-1"], ["a", "1x"], ["a", ""], "abc"])
def test_wrong_usage(classify, arguments):
    done = run(classify, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(b"usage: ")


def test_a_picture_that_is_not_there(classify, tmp_path):
    done = run(classify, str(tmp_path / "none.ppm"))
    assert done.returncode == 3
    assert b"No such file" in done.stderr
    assert run(classify, str(tmp_path)).returncode in (3, 4)


def test_any_bytes_are_answered_with_a_code(classify, tmp_path):
    random = np.random.default_rng(0)
    whole = b"P6\n3 2\n255\n" + PIXELS
    for _ in range(25):
        data = bytearray(whole)
        data[random.integers(0, 12)] = random.integers(256)
        assert 0 <= run(classify, written(tmp_path, bytes(data))).returncode <= 9


def test_grey_pictures_are_pgm(tmp_path):
    classify = made(tmp_path, 1)
    done = run(classify, written(tmp_path, b"P5\n3 2\n255\n" + bytes(range(6))), "1")
    assert done.returncode == 0, done.stderr
    assert run(classify, written(tmp_path, b"P6\n3 2\n255\n" + PIXELS)).returncode == 4


def test_class_names_reach_the_output_as_they_are(tmp_path):
    names = ('a"b', "c\\n%s", "größe ??/ é7", "日本 1")
    classify = made(tmp_path, 3, class_names=names)
    done = run(classify, written(tmp_path, b"P6\n3 2\n255\n" + PIXELS), "4")
    assert {line.split("\t")[1] for line in done.stdout.decode().splitlines()} == set(names)


def test_a_built_runner_is_no_damage(classify):
    package = read_package(classify.parent.parent)
    assert package.manifest.runners == {"c": "run_c/main.c"}


def test_without_c_code_there_is_no_runner(folder_package):
    manifest = read_package(folder_package).manifest
    assert manifest.runners == {"python": "run.py"}
    assert manifest.notes == ["There is no runner in C: no artifact is C code."]
    assert not (folder_package / "run_c").exists()


def test_it_runs_the_c_target(artifacts, packed, pictures, tmp_path, monkeypatch):
    """The target's own C code of the network, against ONNX Runtime."""
    target = pytest.importorskip("understudy.export.targets.c", reason="there is no target c")
    import onnx
    import torch
    from onnx import numpy_helper
    from torch import nn

    from understudy.export.target import ExportSource

    weights = {
        one.name: torch.from_numpy(numpy_helper.to_array(one).copy())
        for one in onnx.load(artifacts[0].path).graph.initializer
    }
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 5, 4)
    )
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "c").mkdir()
    source = ExportSource(model.eval(), tuple(pictures.shape[1:]), CLASS_NAMES)
    try:
        artifact = target.export(source, tmp_path / "c", precision="float32")
    except MissingExtraError as error:
        pytest.skip(str(error))
    given = dataclasses.replace(packed, measured={})
    write_package(tmp_path / "p", [artifact, *artifacts], given)
    classify = built(tmp_path / "p", flags="-O2 -ffp-contract=off")
    shares_NK = softmax(onnx_logits(artifacts[0].path, pictures))
    for pixels_CHW, shares_K in zip(pictures, shares_NK, strict=True):
        path = tmp_path / "p.ppm"
        Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))).save(path)
        done = run(classify, str(path), "1")
        assert done.returncode == 0, done.stderr
        share, name = done.stdout.decode().strip().split("\t")
        assert name == CLASS_NAMES[shares_K.argmax()]
        assert float(share) == pytest.approx(shares_K.max(), abs=1e-4)
    write_package(tmp_path / "only_c", [artifact], given)
    package = read_package(tmp_path / "only_c")
    with pytest.raises(InputError, match=r"is code.*ask for artifact c-float32 by name"):
        predict_arrays(package, pictures, order="RGB")
    found = predict_arrays(package, pictures, order="RGB", artifact="c-float32")
    assert [one.guesses[0].class_index for one in found] == shares_NK.argmax(axis=1).tolist()
