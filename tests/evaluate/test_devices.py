import subprocess
import sys

import pytest

from understudy.errors import InputError
from understudy.evaluate.budget import Budget, BudgetFacts, check_budget
from understudy.evaluate.devices import (
    device_budget,
    device_names,
    estimate_time,
    facts_for,
    load_device,
    parse_device,
)
from understudy.export.target_names import TARGETS

PROFILE = """
title: A board
runtime: onnx
precision: int8
limits: {model_size_bytes: 1000, latency_ms: {at_most: 5}}
clock: {mhz: 100, cycles_per_instruction: 2, source: its data sheet}
"""


@pytest.mark.parametrize("name", device_names())
def test_shipped_profiles_are_valid_and_say_where_their_power_is_from(name):
    device = load_device(name)
    assert device.runtime in TARGETS
    assert device.power is not None
    assert device.power.source.startswith("assumed")
    limits = device_budget(device)
    assert limits
    assert Budget.model_validate(limits) == device.limits


def test_the_shipped_profiles():
    assert {"server-cpu", "phone", "raspberry-pi-4", "cortex-m4-256kb", "cortex-m7", "browser"} <= (
        set(device_names())
    )
    small = load_device("cortex-m4-256kb")
    assert device_budget(small)["ram_bytes"] == 256 * 1024
    assert small.cpu == "cortex-m4"
    assert [name for name in device_names() if load_device(name).is_this_machine] == ["server-cpu"]


def test_an_own_profile_is_read_from_its_file(tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text(PROFILE)
    device = load_device(path)
    assert device_budget(device) == {
        "model_size_bytes": 1000,
        "latency_ms": {"batch": 1, "threads": 1, "percentile": 95, "at_most": 5.0},
    }
    estimate = estimate_time(device, 3_000_000)
    assert estimate.milliseconds == pytest.approx(60)
    assert estimate.method == "estimate"
    assert estimate.source == "3,000,000 instructions at 100 MHz, 2 cycles each (its data sheet)"
    assert estimate_time(load_device("phone"), 10) is None


def test_a_wrong_name_lists_the_right_ones(tmp_path):
    with pytest.raises(InputError, match=r"no device 'fone' \(did you mean 'phone'\?\).* browser,"):
        load_device("fone")
    with pytest.raises(InputError, match=r"absent\.yaml cannot be read"):
        load_device(tmp_path / "absent.yaml")


def test_every_problem_of_a_profile_is_listed():
    text = """
title: A board
runtime: onx
precison: int8
limits: {ram: 5, latency_ms: {at_most: -1}}
power: {watts: 3}
"""
    with pytest.raises(InputError) as raised:
        parse_device(text, origin="board")
    lines = sorted(raised.value.problems)
    assert [line.split(";")[0] for line in lines] == [
        "board: `limits.latency_ms.at_most` is -1",
        "board: `power.source` is missing",
        "board: `precision` is missing",
        "board: `runtime` is 'onx'",
        "board: unknown key `limits.ram` (did you mean 'ram_bytes'?)"
        if "did you mean" in lines[4]
        else "board: unknown key `limits.ram`",
        "board: unknown key `precison` (did you mean 'precision'?)",
    ]
    for text in ("[1, 2", "- 1", "", "3", "title: 2024-13-01"):
        with pytest.raises(InputError, match="board"):
            parse_device(text, origin="board")


def test_a_wrong_key_of_a_limit_lists_the_keys_of_that_limit():
    wrong = PROFILE.replace("at_most: 5", "at_most: 5, thread: 4")
    expected = r"`limits.latency_ms.thread`.*'threads'\?.*one of batch, threads"
    with pytest.raises(InputError, match=expected):
        parse_device(wrong, origin="board")


def test_what_this_machine_measures_is_not_taken_for_the_devices():
    facts = BudgetFacts(
        model_size_bytes=900,
        measurements=[{"batch_size": 1, "num_threads": 1, "p95_ms": 0.1}],
        peak_memory_bytes=5,
        energy_mj=1.0,
    )
    device = parse_device(PROFILE, origin="board")

    def statuses(is_on_device):
        judged = facts_for(device, facts, is_on_device=is_on_device)
        return [row.status for row in check_budget(device.limits, facts=judged)]

    assert statuses(is_on_device=False) == ["passed", "not_measured"]
    assert statuses(is_on_device=True) == ["passed", "passed"]
    server = load_device("server-cpu")
    assert facts_for(server, facts, is_on_device=False) is facts


def test_profiles_are_read_without_torch_or_numpy():
    code = (
        "import sys; from understudy.evaluate.devices import load_device; load_device('phone'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'onnx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
