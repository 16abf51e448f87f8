import json
import threading
import time

import numpy as np
import pytest
from measure_model import write_linear

from understudy.errors import InputError
from understudy.evaluate import counters
from understudy.evaluate.counters import (
    PowercapCounter,
    find_counters,
    find_gpu_counters,
    measure_window,
    spent_uj,
)
from understudy.evaluate.energy import (
    energy_of_window,
    estimate_energy,
    measure_energy,
    measure_energy_here,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
RANGE_UJ = 10_000


def write_zone(folder, zone, name, *, uj=0, range_uj=RANGE_UJ):
    path = folder / zone
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path):
    """Two packages with cores inside, memory beside one, and one package told of twice."""
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        write_zone(tmp_path, zone, name)
    return tmp_path


class Source:
    """Raises a counter's file by so many watts, wrapping it at its range, until it is stopped."""

    def __init__(self, path, watts, range_uj=RANGE_UJ):
        self.path, self.watts, self.range_uj = path, watts, range_uj
        self.uj, self.stopped = 9_000.0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        last = time.perf_counter()
        while not self.stopped.wait(0.001):
            now = time.perf_counter()
            self.uj, last = (self.uj + self.watts() * (now - last) * 1e6) % self.range_uj, now
            # A reader must never see a half-written file.
            part = self.path.with_suffix(".part")
            part.write_text(f"{int(self.uj)}\n")
            part.replace(self.path)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.thread.join()


def test_only_what_adds_up_is_counted(powercap):
    found = find_counters(str(powercap))
    assert [counter.name for counter in found["counters"]] == [
        "intel-rapl:0 package-0",
        "intel-rapl:0:1 dram",
        "intel-rapl:1 package-1",
    ]


def test_a_counter_that_starts_again_is_followed(tmp_path):
    counter = PowercapCounter("package", tmp_path, range_uj=10_000)
    other = PowercapCounter("dram", tmp_path, range_uj=500)
    assert spent_uj([counter], [2_000], [2_500]) == 500
    assert spent_uj([counter], [9_900], [150]) == 250
    assert spent_uj([counter, other], [9_900, 450], [150, 20]) == 250 + 70
    assert spent_uj([counter], [7], [7]) == 0


def test_energy_of_a_run_during_which_the_counter_starts_again(tmp_path):
    path = write_zone(tmp_path, "intel-rapl:0", "package-0", uj=9_000)

    def run():
        path.write_text(f"{(int(path.read_text()) + 7_000) % RANGE_UJ}\n")

    found = find_counters(str(tmp_path))
    window = measure_window(run, found, seconds=1e-9, idle_seconds=0.01)
    assert (window["num_runs"], window["uj"], window["idle_uj"]) == (1, 7_000, 0)
    energy = energy_of_window(window, images_a_run=5)
    assert energy.method == "counter"
    assert energy.energy_mj == pytest.approx(7 / 5)
    assert energy.num_images == 5
    assert "above idle, from counters intel-rapl:0 package-0" in str(energy)


def test_what_the_machine_takes_idle_is_taken_off():
    window = {"counters": ["c"], "reason": "", "idle_uj": 3e6, "idle_seconds": 2, "num_runs": 10}
    energy = energy_of_window({**window, "uj": 20e6, "seconds": 4}, images_a_run=100)
    assert (energy.idle_watts, energy.watts) == (1.5, 3.5)
    assert energy.energy_mj == pytest.approx(14_000 / 1000)


def test_counters_are_read_in_the_process_that_runs_the_file(tmp_path):
    path = write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", range_uj=10**9)
    model_path = write_linear(tmp_path / "model.onnx")
    start = time.perf_counter()
    # Power that grows for ever: any later window takes more than the idle one before it.
    with Source(path, lambda: 1 + 10 * (time.perf_counter() - start), range_uj=10**9):
        energy = measure_energy(
            model_path,
            IMAGES,
            batch_size=4,
            seconds=0.2,
            idle_seconds=0.2,
            powercap=tmp_path / "powercap",
        )
    assert energy.method == "counter"
    assert energy.watts > 0
    assert energy.num_images % 4 == 0
    total_mj = energy.watts * energy.seconds * 1e3
    assert energy.energy_mj == pytest.approx(total_mj / energy.num_images)
    json.dumps(energy.to_json(), allow_nan=False)


def test_no_counters_is_not_measured(tmp_path):
    energy = measure_energy(tmp_path / "absent.onnx", IMAGES, powercap=tmp_path / "none")
    assert (energy.energy_mj, energy.method) == (None, "not measured")
    assert "the machine has no energy counters" in str(energy)


def test_a_counter_that_may_not_be_read_leaves_nothing_measured(powercap):
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    (powercap / "intel-rapl:1" / "energy_uj").mkdir()
    found = find_counters(str(powercap))
    assert found["counters"] == []
    assert "cannot be read: intel-rapl:1: Is a directory" in found["reason"]


def test_counters_that_rise_no_faster_than_idle_are_not_measured():
    window = {"counters": ["c"], "idle_uj": 100, "idle_seconds": 1, "uj": 100, "seconds": 1}
    energy = energy_of_window({**window, "num_runs": 3}, images_a_run=1)
    assert energy.method == "not measured"
    assert "rose no faster than idle" in energy.source


def test_an_estimate_says_that_it_is_one():
    energy = estimate_energy(watts=3, source="assumed", milliseconds=10, num_images=100)
    assert energy.energy_mj == pytest.approx(0.3)
    assert energy.method == "estimate"
    assert str(energy) == "about 0.3 mJ a picture, estimate: 3 W (assumed) times 10 ms"
    with pytest.raises(InputError) as raised:
        estimate_energy(watts=0, source=" ", milliseconds=float("nan"))
    assert len(raised.value.problems) == 3


def test_without_a_gpu_its_energy_is_not_measured():
    if find_gpu_counters()["counters"]:
        pytest.skip("this machine has a GPU with counters")
    energy = measure_energy_here(lambda: None, device="cuda", images_a_run=1)
    assert energy.method == "not measured"
    assert energy.source


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_energy_in_this_process_is_that_of_the_device_that_works(device, monkeypatch):
    class Counter:
        """Rises by 2 W, and by 3 W more while a run is going on."""

        name, range_uj, watts, uj, at = "some", 10**12, 2.0, 0.0, time.perf_counter()

        def read_uj(self):
            now = time.perf_counter()
            self.uj, self.at = self.uj + self.watts * 1e6 * (now - self.at), now
            return int(self.uj)

    found, nothing = {"counters": [Counter()], "reason": ""}, {"counters": [], "reason": "none"}
    monkeypatch.setattr(counters, "find_counters", lambda: found if device == "cpu" else nothing)
    monkeypatch.setattr(
        counters, "find_gpu_counters", lambda: found if device == "cuda" else nothing
    )
    counter = found["counters"][0]

    def run():
        counter.read_uj()
        counter.watts = 5.0
        time.sleep(0.02)
        counter.read_uj()
        counter.watts = 2.0

    energy = measure_energy_here(run, device=device, images_a_run=4, seconds=0.2, idle_seconds=0.05)
    assert energy.method == "counter"
    assert energy.watts == pytest.approx(3.0, rel=0.2)
    assert energy.energy_mj == pytest.approx(3.0 * 20 / 4, rel=0.5)
