"""Exits as ONNX files: parity, nothing deeper inside, and a choice that decides as in Python."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from understudy.errors import InputError, ModelError, ParityError
from understudy.evaluate.exit_file import check_choice, exit_latencies_ms, mean_time_ms
from understudy.evaluate.exit_policy import NEVER, ExitPolicy, confidences, leave_at
from understudy.export.exits import ExitWriter, run_choice
from understudy.export.onnx_file import read_onnx_facts
from understudy.export.onnx_run import open_session
from understudy.export.parity import check_parity
from understudy.heads.exits import SingleExit, add_exits, exit_macs
from understudy.models.build import NormalizedModel, build_network
from understudy.models.onnx_cost import onnx_cost

SHAPE = (3, 16, 16)
NAMES = ("a", "b", "c", "d", "e")
TEMPERATURES = (1.5, 0.8, 1.0)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    arguments = {"stages": [[8, 1], [16, 2], [24, 1]], "residual": True}
    inner = build_network("separable", num_classes=5, image_shape=SHAPE, arguments=arguments)
    model = NormalizedModel(inner, mean=[0.5] * 3, std=[0.25] * 3)
    made = add_exits(model, SHAPE, ["stem", "blocks.0"], num_classes=5, channels=8)
    for module in made.modules():  # statistics unlike those of a new network, so that they count
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    for head in made.heads:
        torch.nn.init.normal_(head.linear.weight, std=2)
    return made.eval()


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(48, 3, 4, 4, generator=generator)
    return (255 * torch.nn.functional.interpolate(noise, scale_factor=4)).to(torch.uint8)


@pytest.fixture(scope="module")
def exit_logits(network, pictures):
    with torch.no_grad():
        return torch.stack(network(pictures, all_exits=True))


def between(values_N, share):
    """A threshold in the middle of two confidences, so that rounding does not decide."""
    ordered, number = values_N.sort().values, int(share * len(values_N))
    return (ordered[number : number + 2].sum() / 2).item()


@pytest.fixture(scope="module")
def policy(exit_logits):
    """Thresholds at which every exit is left at by some."""
    values_EN = confidences(exit_logits, TEMPERATURES)
    first = between(values_EN[0], 0.6)
    second = between(values_EN[1][values_EN[0] < first], 0.5)
    return ExitPolicy((first, second), TEMPERATURES)


@pytest.fixture(scope="module")
def writer(network):
    return ExitWriter(network, image_shape=SHAPE, class_names=NAMES)


@pytest.fixture(scope="module")
def choice(writer, policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("choice") / "choice.onnx"
    writer.write_choice(path, thresholds=policy.thresholds, temperatures=policy.temperatures)
    return path


def test_the_file_of_an_exit_holds_what_it_needs_and_nothing_deeper(
    network, writer, pictures, tmp_path
):
    found = []
    for number in range(3):
        path = tmp_path / f"{number}.onnx"
        facts = writer.write_exit(path, number)
        assert facts.metadata["understudy.exit"] == str(number)
        assert facts.class_names == NAMES
        assert check_parity(SingleExit(network, number), path, pictures).passed
        num_params, macs, _, _ = onnx_cost(path)
        found.append((facts.num_nodes, num_params, macs, facts.size_bytes))
    assert found == sorted(found)
    assert all(len(set(column)) == 3 for column in zip(*found, strict=True))
    # Of PyTorch's count the heads on the way, which a file of one exit does not have.
    macs = exit_macs(network, SHAPE)
    assert found[0][2] == macs[0]
    assert found[1][2] < macs[1]


def test_the_file_decides_as_the_policy_on_every_picture(choice, policy, pictures, exit_logits):
    expected_N = leave_at(confidences(exit_logits, TEMPERATURES), policy.thresholds)
    assert set(expected_N.tolist()) == {0, 1, 2}
    session = open_session(choice)
    for image, number, logits_EK in zip(
        pictures, expected_N.tolist(), exit_logits.transpose(0, 1), strict=True
    ):
        logits_NK, found = run_choice(session, image[None])
        assert found == number
        torch.testing.assert_close(logits_NK[0], logits_EK[number], rtol=1e-4, atol=1e-4)
    parity = check_choice(choice, pictures, exit_logits, policy)
    assert parity.passed
    assert parity.num_same_exit + parity.num_near == 48


def test_a_batch_leaves_when_all_of_it_is_confident(choice, policy, pictures, exit_logits):
    values_EN = confidences(exit_logits, TEMPERATURES)
    first_N = values_EN[0] >= policy.thresholds[0]
    session = open_session(choice)
    logits_NK, number = run_choice(session, pictures[first_N])
    assert number == 0
    torch.testing.assert_close(logits_NK, exit_logits[0, first_N], rtol=1e-4, atol=1e-4)
    second_N = values_EN[1] >= policy.thresholds[1]
    assert (second_N & ~first_N).any()
    assert run_choice(session, pictures[second_N])[1] == 1
    logits_NK, number = run_choice(session, pictures)
    assert number == 2
    torch.testing.assert_close(logits_NK, exit_logits[2], rtol=1e-4, atol=1e-4)


def executed(path, pictures, folder):
    """Return the names of the nodes that ONNX Runtime ran, from its own profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    run_choice(session, pictures)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [e["name"] for e in events if e["name"].endswith("kernel_time")]


def test_what_lies_behind_an_exit_is_not_run(writer, pictures, tmp_path):
    num_run = []
    for thresholds in ((0.0, 0.0), (NEVER, 0.0), (NEVER, NEVER)):
        path = tmp_path / "forced.onnx"
        writer.write_choice(path, thresholds=thresholds, temperatures=TEMPERATURES)
        num_run.append(len(executed(path, pictures[:1], tmp_path)))
    assert num_run[0] < num_run[1] < num_run[2]
    # Not only not run: at the top there is only the first exit.
    graph = onnx.load(path).graph
    assert len(graph.initializer) < 20
    assert [node.op_type for node in graph.node].count("If") == 1


def test_thresholds_are_written_into_the_file(choice, policy):
    facts = read_onnx_facts(choice)
    assert json.loads(facts.metadata["understudy.exits"]) == policy.to_json()
    assert facts.output_name == "logits"
    assert facts.output_shape == (None, 5)
    outputs = onnx.load(choice).graph.output
    assert [value.name for value in outputs] == ["logits", "exit"]


def test_the_same_network_gives_the_same_bytes(writer, choice, policy, tmp_path):
    again = tmp_path / "again.onnx"
    writer.write_choice(again, thresholds=policy.thresholds, temperatures=policy.temperatures)
    assert again.read_bytes() == choice.read_bytes()


def test_another_policy_than_the_files_is_found_out(choice, policy, pictures, exit_logits):
    other = ExitPolicy((NEVER, policy.thresholds[1]), TEMPERATURES)
    with pytest.raises(ParityError, match="leaves at the policy's exit for"):
        check_choice(choice, pictures, exit_logits, other)
    with pytest.raises(ParityError, match="differ by up to"):
        check_choice(choice, pictures, exit_logits + 1, policy)


def test_wrong_numbers_of_thresholds_and_classes_are_told(writer, network, tmp_path):
    with pytest.raises(InputError, match="1 thresholds and 3 temperatures for 3 exits"):
        writer.write_choice(tmp_path / "x.onnx", thresholds=[0.5], temperatures=TEMPERATURES)
    with pytest.raises(InputError, match="opset is 11; expected 18 to 23"):
        ExitWriter(network, image_shape=SHAPE, class_names=NAMES, opset=11)
    with pytest.raises(ModelError, match="3 class names for exits with 5 logits"):
        ExitWriter(network, image_shape=SHAPE, class_names=NAMES[:3])


def test_times_of_exits_are_measured(writer, choice, pictures):
    times = exit_latencies_ms(writer, pictures[:4].numpy(), min_seconds=0.02)
    assert len(times) == 3
    assert all(time > 0 for time in times)
    assert mean_time_ms(choice, pictures[:10], min_seconds=0.02) > 0
