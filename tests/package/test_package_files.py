"""A package is whole or not there, and nothing in it is used that was changed."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from package_samples import CLASS_NAMES, CREATED, Files, card, contents

from understudy.artifacts import content_hash, exclusive
from understudy.errors import InputError
from understudy.package import reading, writing
from understudy.package.manifest import MANIFEST_NAME, unsafe_name
from understudy.package.placing import check_package_path
from understudy.package.reading import read_package
from understudy.package.writing import write_package

NAMES = {
    "MODEL_CARD.md",
    "artifacts/onnx-float32/student.onnx",
    "artifacts/onnx-int8/student.onnx",
    "manifest.json",
    "reference_statistics.json",
    "run.py",
    "runtimes/onnx.py",
}


def names_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents_of(folder):
    return {name: (folder / name).read_bytes() for name in names_below(folder)}


@pytest.fixture
def copy(folder_package, tmp_path):
    """A package folder to be damaged."""
    return Path(shutil.copytree(folder_package, tmp_path / "copy"))


def rezipped(source, target, change):
    """Write a zip again with (info, data) pairs as ``change`` returns them."""
    with zipfile.ZipFile(source) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in change(members):
            archive.writestr(info, data)
    return target


def resealed(folder, change):
    """Change the manifest of a folder as one who knows how its hash is made."""
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    del values["content_sha256"]
    change(values)
    path.write_text(json.dumps({**values, "content_sha256": content_hash(values)}))


class TestRoundTrip:
    def test_a_folder_holds_what_was_given(self, folder_package, artifacts):
        assert names_below(folder_package) == NAMES
        package = read_package(folder_package)
        manifest = package.manifest
        assert (manifest.name, manifest.version, manifest.created) == ("garden", "1.2", CREATED)
        assert tuple(manifest.class_names) == CLASS_NAMES
        assert manifest.files.keys() == NAMES - {MANIFEST_NAME}
        assert manifest.default_artifact == "onnx-float32"
        first, second = manifest.artifacts
        assert first.measured == {"accuracy": 0.786, "latency_ms": 0.0452}
        assert second.measured == {}
        assert first.size_bytes == artifacts[0].size_bytes
        assert first.facts == artifacts[0].facts
        preprocessing = manifest.preprocessing
        assert preprocessing.image_shape == (3, 16, 12)
        assert (preprocessing.color_order, preprocessing.layout) == ("RGB", "NCHW")
        for artifact in artifacts:
            packed = package.folder / "artifacts" / f"onnx-{artifact.precision}" / "student.onnx"
            assert packed.read_bytes() == artifact.path.read_bytes()

    def test_a_zip_holds_the_same_as_a_folder(self, folder_package, zip_package):
        with read_package(zip_package) as package:
            assert contents_of(package.folder) == contents_of(folder_package)
            assert package.source == zip_package

    def test_what_was_unpacked_goes_with_the_package(self, zip_package):
        with read_package(zip_package) as package:
            folder = package.folder
            assert folder.is_dir()
        assert not folder.exists()
        package = read_package(zip_package)
        folder = package.folder
        del package
        assert not folder.exists()

    def test_closing_a_folder_leaves_it(self, copy):
        read_package(copy).close()
        assert names_below(copy) == NAMES

    def test_equal_contents_are_equal_bytes(self, artifacts, packed, tmp_path, zip_package):
        for artifact in artifacts:
            os.utime(artifact.path, (1, 1))
        again = tmp_path / "again.zip"
        write_package(again, artifacts, packed)
        assert again.read_bytes() == zip_package.read_bytes()

    def test_a_folder_of_files_is_packed_with_all_in_it(self, packed, tmp_path):
        source = tmp_path / "source"
        (source / "student.mlpackage" / "Data").mkdir(parents=True)
        (source / "student.mlpackage" / "Manifest.json").write_text("{}")
        (source / "student.mlpackage" / "Data" / "weights.bin").write_bytes(b"123")
        files = Files("coreml", "float32", source, ("student.mlpackage",), notes=("Not run here.",))
        manifest = write_package(tmp_path / "p", [files], dataclasses.replace(packed, measured={}))
        (artifact,) = read_package(tmp_path / "p").manifest.artifacts
        assert artifact.opens == "student.mlpackage"
        assert artifact.files == [
            "student.mlpackage/Data/weights.bin",
            "student.mlpackage/Manifest.json",
        ]
        assert artifact.size_bytes == 5
        assert "python" not in manifest.runners
        assert any("no run.py" in note for note in manifest.notes)
        assert not (tmp_path / "p" / "run.py").exists()

    def test_one_channel_is_grey(self, tmp_path):
        (tmp_path / "a").write_bytes(b"1")
        pictures = np.zeros((1, 1, 4, 4), np.uint8)
        grey = contents(pictures, np.zeros((1, 4)), image_shape=(1, 4, 4), measured={})
        files = Files("ncnn", "float32", tmp_path, ("a",))
        manifest = write_package(tmp_path / "p", [files], grey)
        assert manifest.preprocessing.color_order == "GRAY"


class TestWriting:
    def test_an_existing_package_is_replaced_only_on_purpose(self, artifacts, packed, copy):
        before = contents_of(copy)
        with pytest.raises(InputError, match=r"exists; expected a new name.*overwrite"):
            write_package(copy, artifacts, packed)
        assert contents_of(copy) == before
        (copy / "run_c").mkdir()
        newer = dataclasses.replace(packed, version="2")
        write_package(copy, artifacts, newer, overwrite=True)
        assert read_package(copy).manifest.version == "2"
        assert not (copy / "run_c").exists()
        assert list(copy.parent.iterdir()) == [copy]

    def test_an_existing_zip_is_replaced_only_on_purpose(self, artifacts, packed, tmp_path):
        path = tmp_path / "p.zip"
        write_package(path, artifacts, packed)
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"exists; expected a new name.*overwrite"):
            write_package(path, artifacts, packed)
        assert path.read_bytes() == before
        newer = dataclasses.replace(packed, version="2")
        write_package(path, artifacts, newer, overwrite=True)
        assert read_package(path).manifest.version == "2"

    def test_a_zip_that_is_no_package_is_never_replaced(self, artifacts, packed, tmp_path):
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("holiday.jpg", b"sea")
        photos = path.read_bytes()
        # The second has the end of a zip and no list of files.
        for data in (photos, b"PK" + photos[-22:], b"something"):
            path.write_bytes(data)
            with pytest.raises(InputError, match="is not a package"):
                check_package_path(path, overwrite=True)
            with pytest.raises(InputError, match="is not a package"):
                write_package(path, artifacts, packed, overwrite=True)
            assert path.read_bytes() == data

    def test_a_folder_that_is_no_package_is_never_replaced(self, artifacts, packed, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "letter.txt").write_text("dear")
        with pytest.raises(InputError, match="is not a package"):
            write_package(tmp_path / "home", artifacts, packed, overwrite=True)
        assert (tmp_path / "home" / "letter.txt").read_text() == "dear"

    # A web app, a browser extension, a package of a version to come, damage.
    @pytest.mark.parametrize(
        "manifest",
        [
            '{"name": "My app", "icons": []}',
            '{"schema_version": 1, "content_sha256": "0", "made_by": "another tool 1"}',
            '{"schema_version": true, "content_sha256": "0", "made_by": "understudy 1"}',
            '{"schema_version": 2, "content_sha256": "0", "made_by": "understudy 1"}',
            '{"schema_version": 1, "made_by": "understudy 1"}',
            "[1]",
            "{",
            "[" * 100_000,
        ],
    )
    def test_a_manifest_of_something_else_makes_no_package(
        self, artifacts, packed, tmp_path, manifest
    ):
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / MANIFEST_NAME).write_text(manifest)
        with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
            archive.writestr(MANIFEST_NAME, manifest)
        zipped = (tmp_path / "app.zip").read_bytes()
        for name in ("app", "app.zip"):
            with pytest.raises(InputError, match="exists and is not a package"):
                write_package(tmp_path / name, artifacts, packed, overwrite=True)
        assert contents_of(tmp_path / "app") == {MANIFEST_NAME: manifest.encode()}
        assert (tmp_path / "app.zip").read_bytes() == zipped

    def test_a_users_files_in_a_package_are_never_deleted(self, artifacts, packed, copy):
        for name in ("notes.txt", "run_c/picture.ppm", "a", "b"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("mine")
        before = contents_of(copy)
        match = r"not the package's: 'a', 'b', 'notes.txt' and 1 more"
        with pytest.raises(InputError, match=match):
            check_package_path(copy, overwrite=True)
        with pytest.raises(InputError, match=match):
            write_package(copy, artifacts, packed, overwrite=True)
        assert contents_of(copy) == before
        for name in ("notes.txt", "run_c/picture.ppm", "a", "b"):
            (copy / name).unlink()
        (copy / "run_c" / "classify").write_text("built")
        (copy / "run.py").write_text("damaged")
        write_package(copy, artifacts, packed, overwrite=True)
        assert names_below(copy) == NAMES

    def test_an_empty_folder_may_be_filled(self, artifacts, packed, tmp_path):
        (tmp_path / "empty").mkdir()
        write_package(tmp_path / "empty", artifacts, packed)
        assert names_below(tmp_path / "empty") == NAMES

    @pytest.mark.parametrize("name", ["p", "p.zip"])
    @pytest.mark.parametrize("function", ["_copy", "_write", "_sync", "read_package"])
    def test_a_failure_at_any_write_leaves_nothing(
        self, artifacts, packed, tmp_path, monkeypatch, name, function
    ):
        whole = getattr(writing, function)
        calls = []

        def fail_at(last):
            def failing(*arguments):
                calls.append(arguments)
                if len(calls) > last:
                    raise KeyboardInterrupt
                return whole(*arguments)

            return failing

        for last in range(20):
            calls.clear()
            monkeypatch.setattr(writing, function, fail_at(last))
            try:
                write_package(tmp_path / name, artifacts, packed)
            except KeyboardInterrupt:
                assert list(tmp_path.iterdir()) == []
            else:
                break
        assert last > 0
        assert read_package(tmp_path / name).manifest.name == "garden"

    @pytest.mark.parametrize("name", ["p", "p.zip"])
    @pytest.mark.parametrize("method", ["rename", "replace"])
    def test_a_failing_rename_keeps_the_old_package(
        self, artifacts, packed, tmp_path, monkeypatch, name, method
    ):
        write_package(tmp_path / name, artifacts, packed)
        whole = getattr(Path, method)

        def failing(path, target):
            if Path(target) == tmp_path / name and ".part" in str(path) and path.name != "replaced":
                raise OSError(28, "No space left on device")
            return whole(path, target)

        monkeypatch.setattr(Path, method, failing)
        used = (name == "p") == (method == "rename")
        newer = dataclasses.replace(packed, version="2")
        if used:
            with pytest.raises(OSError, match="No space"):
                write_package(tmp_path / name, artifacts, newer, overwrite=True)
        else:
            write_package(tmp_path / name, artifacts, newer, overwrite=True)
        assert read_package(tmp_path / name).manifest.version == ("1.2" if used else "2")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("last", range(2))
    def test_an_interrupt_at_any_rename_keeps_a_package(
        self, artifacts, packed, copy, monkeypatch, last
    ):
        whole = Path.rename
        names = []

        def interrupted(path, target):
            found = whole(path, target)
            names.append(path.name)
            if len(names) == last + 1:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(Path, "rename", interrupted)
        newer = dataclasses.replace(packed, version="2")
        with pytest.raises(KeyboardInterrupt):
            write_package(copy, artifacts, newer, overwrite=True)
        assert read_package(copy).manifest.version == ("1.2", "2")[last]
        assert list(copy.parent.iterdir()) == [copy]

    def test_what_a_killed_writer_set_aside_comes_back(self, artifacts, packed, copy):
        killed = copy.with_name(".copy.abcd1234.part")
        other = copy.with_name(".copy.zip.abcd1234.part")
        for part in (killed, other):
            part.mkdir()
            (part / ".lock").touch()
        copy.rename(killed / "replaced")
        with pytest.raises(InputError, match=r"exists; expected a new name.*overwrite"):
            write_package(copy, artifacts, packed)
        assert read_package(copy).manifest.version == "1.2"
        assert sorted(copy.parent.iterdir()) == sorted([copy, other])

    def test_what_another_process_is_writing_is_left_alone(self, artifacts, packed, copy):
        busy = copy.with_name(".copy.abcd1234.part")
        new = copy.with_name(".copy.new01234.part")
        new.mkdir()
        with exclusive(busy):
            copy.rename(busy / "replaced")
            write_package(copy, artifacts, dataclasses.replace(packed, version="2"))
            assert read_package(busy / "replaced").manifest.version == "1.2"
        assert read_package(copy).manifest.version == "2"
        assert sorted(copy.parent.iterdir()) == sorted([copy, busy, new])

    @pytest.mark.parametrize("name", ["p", "p.zip"])
    def test_a_killed_writer_leaves_nothing_under_the_name(self, artifacts, packed, tmp_path, name):
        code = f"""
import os, pathlib, signal
from package_samples import Files, contents
import numpy as np
from understudy.package import writing
writing.{"_sync" if name == "p" else "_write_zip"} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
source = pathlib.Path({str(artifacts[0].folder)!r})
files = Files("onnx", "float32", source, ("student.onnx",))
pictures = np.zeros((2, 3, 16, 12), np.uint8)
writing.write_package(pathlib.Path({str(tmp_path / name)!r}), [files],
                      contents(pictures, np.zeros((2, 4))))
"""
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths}
        killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
        assert killed.returncode == -9
        assert not (tmp_path / name).exists()
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(f".{name}.")
        assert left.suffix == ".part"
        write_package(tmp_path / name, artifacts, packed)
        assert read_package(tmp_path / name).manifest.name == "garden"
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_everything_wrong_with_the_artifacts_is_said_at_once(self, packed, tmp_path):
        files = Files("onnx", "float32", tmp_path, ("none.onnx", "../student.onnx"))
        wrong = dataclasses.replace(packed, default_artifact="c-int8", measured={"tflite-int8": {}})
        with pytest.raises(InputError) as caught:
            write_package(tmp_path / "p", [files], wrong)
        assert len(caught.value.problems) == 4
        for text in ("none.onnx", "../student.onnx", "c-int8", "tflite-int8"):
            assert text in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"class_names": ("a", "b\x1b[2J")}, "control characters"),
            ({"name": ""}, "at least 1 character"),
            ({"image_shape": (2, 4, 4)}, "RGB has 3 channels"),
            ({"measured": {"onnx-float32": {"accuracy": float("nan")}}}, "measurements of onnx"),
            ({"statistics": {"mean": float("inf")}}, "statistics cannot be written as JSON"),
        ],
    )
    def test_contents_that_do_not_fit(self, artifacts, packed, tmp_path, changes, message):
        with pytest.raises(InputError, match=message):
            write_package(tmp_path / "p", artifacts, dataclasses.replace(packed, **changes))
        assert list(tmp_path.iterdir()) == []

    def test_two_artifacts_of_one_name(self, artifacts, packed, tmp_path):
        with pytest.raises(InputError, match="same target and precision"):
            write_package(tmp_path / "p", [artifacts[0], artifacts[0]], packed)

    def test_no_artifacts(self, packed, tmp_path):
        with pytest.raises(InputError, match="there are no artifacts"):
            write_package(tmp_path / "p", [], packed)


class TestDamagedFolder:
    @pytest.mark.parametrize("name", sorted(NAMES - {MANIFEST_NAME}))
    def test_a_changed_byte(self, copy, name):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} was changed.*Get the package again"):
            read_package(copy)

    def test_every_bit_of_the_manifest_counts(self, copy):
        path = copy / MANIFEST_NAME
        whole = path.read_bytes()
        values = json.loads(whole)
        positions = np.random.default_rng(0).integers(0, len(whole), 120)
        for position in positions:
            data = bytearray(whole)
            data[position] ^= 1 << int(position) % 8
            path.write_bytes(data)
            try:
                read_package(copy)
            except InputError:
                continue
            assert json.loads(data) == values, "only blanks may differ"

    @pytest.mark.parametrize("name", sorted(NAMES))
    def test_a_missing_file(self, copy, name):
        (copy / name).unlink()
        match = "has no manifest.json" if name == MANIFEST_NAME else f"{name} is missing"
        with pytest.raises(InputError, match=match):
            read_package(copy)

    def test_every_damage_is_said_at_once(self, copy):
        (copy / "run.py").unlink()
        (copy / "MODEL_CARD.md").write_text("better")
        (copy / "artifacts" / "extra").write_text("")
        with pytest.raises(InputError) as caught:
            read_package(copy)
        assert len(caught.value.problems) == 3

    def test_a_cut_file(self, copy):
        path = copy / "artifacts/onnx-float32/student.onnx"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"student.onnx has [\d,]+ bytes; expected [\d,]+"):
            read_package(copy)

    def test_an_extra_file_among_the_artifacts(self, copy):
        (copy / "artifacts" / "onnx-float32" / "weights.bin").write_text("")
        with pytest.raises(InputError, match=r"onnx-float32/weights.bin' is not in the manifest"):
            read_package(copy)

    @pytest.mark.parametrize(
        "name", ["json.py", "run_c/student.h", "runtimes/numpy/__init__.py", "build/x", ".x"]
    )
    def test_an_extra_file_elsewhere(self, copy, name):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("")
        with pytest.raises(InputError, match=f"'{name}' is not in the manifest"):
            read_package(copy)

    @pytest.mark.parametrize(
        "name",
        [
            "run_c/classify",
            "runtimes/__pycache__/onnx.cpython-311.pyc",
            "artifacts/c-int8/build/native/selftest",
            ".DS_Store",
        ],
    )
    def test_what_a_user_builds_is_no_damage(self, copy, name):
        before = read_package(copy).manifest
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
        assert read_package(copy).manifest == before

    @pytest.mark.parametrize("name", ["run.py", "artifacts/onnx-int8", "artifacts", MANIFEST_NAME])
    def test_a_symbolic_link(self, copy, tmp_path, name):
        (copy / name).rename(tmp_path / "elsewhere")
        (copy / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"symbolic link|has no manifest"):
            read_package(copy)

    def test_an_extra_link_among_the_artifacts(self, copy, tmp_path):
        (copy / "artifacts" / "more").symlink_to(tmp_path)
        with pytest.raises(InputError, match="more' is not in the manifest"):
            read_package(copy)

    @pytest.mark.parametrize("version", [0, 2, "1", True, None])
    def test_another_schema_version(self, copy, version):
        resealed(copy, lambda values: values.update(schema_version=version))
        with pytest.raises(InputError, match=f"schema version {version!r}; expected version 1"):
            read_package(copy)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(extra=1), "extra: Extra inputs"),
            (lambda v: v.pop("name"), "name: Field required"),
            (lambda v: v.update(default_artifact="c-int8"), "'c-int8' is not in the table"),
            (lambda v: v["files"].pop("run.py"), "no hash of run.py"),
            (lambda v: v["files"]["run.py"].update(bytes=-1), "greater than or equal to 0"),
            (lambda v: v["files"]["run.py"].update(bytes=int("9" * 4300)), "run.py.bytes: .*less"),
            (lambda v: v["artifacts"][0].update(size_bytes="12"), "size_bytes: .*valid integer"),
            (lambda v: v["artifacts"][0].update(opens=7), "opens: .*string"),
            (lambda v: v["files"].update({"ö" * 128: v["files"]["run.py"]}), "more than 255 bytes"),
            (lambda v: v.update(default_artifact="\x1b[2J"), "default_artifact: has control"),
            (lambda v: v.update({"\x1b[2J\n": 1}), r"json, \\x1b\[2J\\n: Extra inputs"),
            (lambda v: v["artifacts"].clear(), "at least 1 item"),
            (lambda v: v["artifacts"][0].update(opens="other"), "opens 'other'"),
            (lambda v: v["artifacts"][0].update(folder="/etc"), "it is absolute"),
            (lambda v: v["artifacts"][0].update(files=["../../x"]), "'..'"),
            (lambda v: v["files"].update({"../x": v["files"]["run.py"]}), "'..'"),
            (lambda v: v["files"].update({"RUN.PY": v["files"]["run.py"]}), "beside another file"),
            (lambda v: v["files"].update({"run.py/x": v["files"]["run.py"]}), "beside another"),
            (lambda v: v["class_names"].__setitem__(0, "\x1b[2J"), "control characters"),
            (lambda v: v["preprocessing"].update(image_shape=[3, 0, 4]), "greater than or equal"),
            (lambda v: v["preprocessing"].update(image_shape=[1, 4, 4]), "RGB has 3 channels"),
            (lambda v: v["preprocessing"].update(value_range=[0, 255]), r"must be \[0, 1\]"),
            (lambda v: v["files"]["run.py"].update(bytes=1 << 40), "Raise max_bytes"),
        ],
    )
    def test_a_manifest_that_does_not_fit(self, copy, change, message):
        resealed(copy, change)
        with pytest.raises(InputError, match=message):
            read_package(copy)

    def test_a_version_of_any_length_is_shown_in_short(self, copy):
        resealed(copy, lambda values: values.update(schema_version="9" * 1_000_000))
        with pytest.raises(InputError, match=r"schema version '9{39}; expected version 1"):
            read_package(copy)

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"7"])
    def test_a_manifest_that_is_none(self, copy, text):
        (copy / MANIFEST_NAME).write_bytes(text)
        with pytest.raises(InputError, match=MANIFEST_NAME):
            read_package(copy)

    def test_a_huge_manifest_is_not_read(self, copy):
        with (copy / MANIFEST_NAME).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(InputError, match=r"has 1,099,511,627,776 bytes; expected at most"):
            read_package(copy)


class TestDamagedZip:
    def test_any_changed_byte_is_seen_or_harmless(self, zip_package, tmp_path):
        whole = zip_package.read_bytes()
        path = tmp_path / "p.zip"
        num_seen = 0
        with read_package(zip_package) as package:
            original = contents_of(package.folder)
        for position in np.random.default_rng(1).integers(0, len(whole), 100):
            data = bytearray(whole)
            data[position] ^= 0xFF
            path.write_bytes(data)
            try:
                with read_package(path) as package:
                    # Dates and the like of the archive itself.
                    assert contents_of(package.folder) == original
            except InputError:
                num_seen += 1
        assert num_seen > 60

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_cut_zip(self, zip_package, tmp_path, share):
        whole = zip_package.read_bytes()
        path = tmp_path / "p.zip"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="is not a zip file"):
            read_package(path)

    def test_nothing_is_left_of_a_damaged_zip(self, zip_package, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        path = rezipped(
            zip_package,
            tmp_path / "p.zip",
            lambda members: [
                (info, data[:-1] + b"#" if info.filename == "run.py" else data)
                for info, data in members
            ],
        )
        with pytest.raises(InputError, match=r"run.py was changed"):
            read_package(path)
        assert list((tmp_path / "temporary").iterdir()) == []

    @pytest.mark.parametrize(
        "name",
        [
            "../outside",
            "/etc/outside",
            "artifacts/../../outside",
            "C:/outside",
            "a\\..\\outside",
            "artifacts//x",
            "./x",
        ],
    )
    def test_names_that_lead_outside(self, zip_package, tmp_path, name):
        path = rezipped(zip_package, tmp_path / "p.zip", lambda members: [*members, (name, b"x")])
        with pytest.raises(InputError, match="cannot be used"):
            read_package(path)
        assert not (tmp_path / "outside").exists()

    def test_a_symbolic_link(self, zip_package, tmp_path):
        link = zipfile.ZipInfo("artifacts/link")
        link.create_system = 3
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        path = rezipped(
            zip_package, tmp_path / "p.zip", lambda members: [*members, (link, b"/etc/passwd")]
        )
        with pytest.raises(InputError, match="it is a symbolic link"):
            read_package(path)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_file_that_is_there_twice(self, zip_package, tmp_path):
        path = rezipped(
            zip_package, tmp_path / "p.zip", lambda members: [*members, ("run.py", b"other")]
        )
        with pytest.raises(InputError, match="there more than once"):
            read_package(path)

    @pytest.mark.parametrize("name", ["extra.txt", "artifacts/extra.bin"])
    def test_an_extra_file(self, zip_package, tmp_path, name):
        path = rezipped(zip_package, tmp_path / "p.zip", lambda members: [*members, (name, b"x")])
        with pytest.raises(InputError, match=f"'{name}' is not in the manifest"):
            read_package(path)

    @pytest.mark.parametrize("name", sorted(NAMES))
    def test_a_missing_file(self, zip_package, tmp_path, name):
        path = rezipped(
            zip_package,
            tmp_path / "p.zip",
            lambda members: [one for one in members if one[0].filename != name],
        )
        match = "has no manifest.json" if name == MANIFEST_NAME else f"{name} is missing"
        with pytest.raises(InputError, match=match):
            read_package(path)

    def test_folders_as_members_are_fine(self, zip_package, tmp_path):
        path = rezipped(
            zip_package, tmp_path / "p.zip", lambda members: [("artifacts/", b""), *members]
        )
        with read_package(path) as package, read_package(zip_package) as whole:
            assert package.manifest == whole.manifest
            assert (package.folder / "artifacts").is_dir()

    def test_other_compressions_are_refused(self, zip_package, tmp_path):
        def change(members):
            for info, _ in members:
                info.compress_type = zipfile.ZIP_LZMA
            return members

        path = rezipped(zip_package, tmp_path / "p.zip", change)
        with pytest.raises(InputError, match="compressed with method 14"):
            read_package(path)

    def test_a_bomb_is_refused_by_what_it_declares(self, zip_package, tmp_path):
        path = rezipped(
            zip_package,
            tmp_path / "p.zip",
            lambda members: [*members, ("artifacts/zeros", bytes(30_000_000))],
        )
        assert path.stat().st_size < 100_000
        with pytest.raises(InputError, match="may be a zip bomb"):
            read_package(path, max_bytes=20_000_000)

    def test_a_bomb_that_declares_little_is_not_unpacked(self, zip_package, tmp_path):
        """Sizes of the central directory that are smaller than what deflate gives."""
        with zipfile.ZipFile(zip_package) as archive:
            true_size = archive.getinfo("run.py").file_size
        path = rezipped(
            zip_package,
            tmp_path / "p.zip",
            lambda members: [
                (info, bytes(30_000_000) if info.filename == "run.py" else data)
                for info, data in members
            ],
        )
        data = path.read_bytes()
        path.write_bytes(
            data.replace((30_000_000).to_bytes(4, "little"), true_size.to_bytes(4, "little"))
        )
        with pytest.raises(InputError, match=r"run.py (cannot be unpacked|was changed)"):
            read_package(path)

    @pytest.mark.parametrize("name", ["manifest.json", "run.py"])
    @pytest.mark.parametrize("offset", [1 << 62, (1 << 64) - 1])
    def test_a_member_that_begins_nowhere(self, zip_package, monkeypatch, name, offset):
        """Zip64 headers have room for such offsets."""
        whole = zipfile.ZipFile.open

        def misplaced(archive, member, *arguments, **options):
            archive.getinfo(name).header_offset = offset
            return whole(archive, member, *arguments, **options)

        monkeypatch.setattr(zipfile.ZipFile, "open", misplaced)
        with pytest.raises(InputError, match="cannot be unpacked"):
            read_package(zip_package)

    def test_too_many_files(self, zip_package, tmp_path, monkeypatch):
        monkeypatch.setattr(reading, "MAX_FILES", 3)
        with pytest.raises(InputError, match="at most 3 files"):
            read_package(zip_package)


class TestNoPackage:
    @pytest.mark.parametrize("name", ["none", "none.zip"])
    def test_nothing_there(self, tmp_path, name):
        with pytest.raises(InputError, match="there is no file or folder"):
            read_package(tmp_path / name)

    def test_a_name_that_no_file_can_have(self, tmp_path):
        with pytest.raises(InputError, match="is too long a name"):
            read_package(tmp_path / ("x" * 300))

    def test_another_file(self, tmp_path):
        (tmp_path / "p.zip").write_text("PK but no zip")
        with pytest.raises(InputError, match="is not a zip file"):
            read_package(tmp_path / "p.zip")

    def test_another_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"has no manifest.json at its top"):
            read_package(tmp_path)

    def test_another_zip(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
            archive.writestr("garden/manifest.json", "{}")
        with pytest.raises(InputError, match=r"has no manifest.json at its top"):
            read_package(tmp_path / "p.zip")

    def test_an_artifact_that_is_not_there(self, folder_package):
        with pytest.raises(InputError, match="expected one of onnx-float32, onnx-int8"):
            read_package(folder_package).artifact("c-int8")


@pytest.mark.parametrize("name", ["a", "a/b.c", "artifacts/onnx-int8/größer 1.onnx", "..a/b.."])
def test_safe_names(name):
    assert unsafe_name(name) is None


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", "a\0b", "a\nb", "x" * 999, "ö" * 128]
)
def test_unsafe_names(name):
    assert unsafe_name(name) is not None


def test_the_card_of_a_package_names_its_artifacts(folder_package):
    text = (folder_package / "MODEL_CARD.md").read_text()
    assert "| `onnx-float32` |" in text
    assert card().summary in text
