"""`understudy profile` of networks by name: any callable's, timm's and transformers'."""

import json
import sys

import pytest
import torch
from torch import nn

from understudy.errors import InputError, MissingExtraError
from understudy.evaluate.eager import EagerModel
from understudy.evaluate.operators import torch_operators
from understudy.evaluate.profile import profile_command
from understudy.evaluate.profile_network import exported_network, is_network_name, named_network

MODULE = """
from torch import nn

def make(num_classes, image_shape):
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 4, 3, padding=1), nn.Identity(), nn.GELU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 64, num_classes),
    )

def raises():
    raise RuntimeError("out of luck")

def nothing():
    return 3

def needs(width):
    return nn.Identity()

constant = 1
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A user's module, which is found by this process alone: PYTHONPATH does not name it."""
    (tmp_path / "their_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("their_nets", None)


def test_the_operators_of_any_callables_network():
    options = {"shape": "2,8,8", "classes": 5, "batches": [3]}
    answer = json.loads(profile_command("their_nets:make", **options, as_json=True))
    table = answer["operators"]
    assert (table["name"], table["batch_size"]) == ("their_nets:make", 3)
    rows = {row["kind"]: (row["num_calls"], row["memory_bytes"]) for row in table["rows"]}
    assert rows["conv2d"] == (2, 3 * (4 + 6) * 64 * 4)
    assert rows["gelu"] == (1, 3 * 4 * 64 * 4)
    assert rows["linear"] == (1, 3 * 5 * 4)
    assert "Identity" not in rows  # it does no work
    # The process that is timed has built it too, from a module that only the caller finds.
    (measured,) = answer["profile"]["latency"]["measurements"]
    assert measured["batch_size"] == 3


def test_operators_with_private_names_are_told_like_any_other():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Flatten(2), layer, nn.Flatten(1))
    images_NCHW = torch.zeros(2, 3, 2, 4, dtype=torch.uint8)
    kinds = {row.kind for row in torch_operators(network, images_NCHW, num_runs=1).rows}
    assert "native multi head attention" in kinds


def test_a_configuration_of_transformers_is_a_network(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    ).save_pretrained(tmp_path / "vit")
    name = f"transformers:{tmp_path / 'vit'}"
    file = named_network(name, tmp_path / "eager", image_shape=(3, 16, 16), num_classes=4)
    model = EagerModel(file.path).model
    table = torch_operators(model, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), num_runs=1)
    rows = {row.kind: row.num_calls for row in table.rows}
    assert rows["conv2d"] == 1
    assert rows["scaled dot product attention"] == 2
    assert rows["layer norm"] == 5


def test_what_is_exported_is_the_network_that_is_compared(tmp_path):
    pytest.importorskip("onnxruntime")
    file = named_network("their_nets:make", tmp_path, image_shape=(2, 8, 8), num_classes=5)
    exported = exported_network("onnx", file, tmp_path / "onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported.path))
    assert session.get_inputs()[0].shape[1:] == [2, 8, 8]
    assert session.get_outputs()[0].shape[1] == 5


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("their_nets:raises", {}, "raised RuntimeError: out of luck"),
        ("their_nets:nothing", {}, "returned a int; expected a torch.nn.Module"),
        ("their_nets:constant", {}, "is not callable: 'constant'"),
        ("their_nets:mke", {}, "has no 'mke'; expected one of its callables, such as make"),
        ("their_nets:needs", {}, "missing a required argument: 'width'.*callable that needs no"),
        ("no_such_module:make", {}, "No module named 'no_such_module'.*the folder that it lies in"),
        ("their nets:make", {}, "malformed model 'their nets:make'; expected one of resnet"),
        ("mlp", {"shape": "3,8"}, "shape of the pictures is '3,8'"),
        ("their_nets:make", {"shape": "2,9,9"}, r"pictures \[2, 2, 9, 9\] raised.*--shape"),
        ("mlp", {"classes": 0}, "--classes is 0; expected a whole number of at least 1"),
        ("their_nets.py", {"classes": 5}, "--classes is 5 without the name of a network"),
        ("nothing.here", {}, "no file 'nothing.here'.*run folder, a recipe.*module:callable"),
        ("their_nets:make", {"shape": "2,8,8", "host": "u@h"}, "--host with the network 'their_ne"),
    ],
)
def test_what_is_wrong_with_a_network_is_one_clear_error(name, options, text):
    with pytest.raises(InputError, match=text) as raised:
        profile_command(name, **options)
    assert len(raised.value.problems) == 1
    assert raised.value.exit_code == 2


def test_a_network_of_other_classes_says_which_option_tells_them(tmp_path):
    (tmp_path / "fixed_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Flatten()\n"
    )
    with pytest.raises(InputError, match=r"returned \(2, 4\).*--classes of `understudy profile`"):
        profile_command("fixed_nets:make", shape="1,2,2")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_there_names_its_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "understudy\[{library}\]"'):
        profile_command(f"{library}:resnet18")


def test_a_file_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_network_name("resnet20")
    (tmp_path / "resnet20").write_text("")
    assert not is_network_name("resnet20")
