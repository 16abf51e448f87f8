"""Energy of a shipped file: read from counters, else a labelled estimate, else not measured."""

from __future__ import annotations

import numpy as np

from understudy.evaluate.devices import Device, load_device
from understudy.evaluate.energy import Energy, estimate_energy, measure_energy, not_measured
from understudy.evaluate.latency import Latency
from understudy.export.target import Artifact
from understudy.recipes.run import Run


def device_of(run: Run) -> Device | None:
    """Return the device that the recipe releases for."""
    name = run.recipe.release.device
    return None if name is None else load_device(name)


def energy_of(run: Run, artifact: Artifact, images_NCHW: np.ndarray, latency: Latency) -> Energy:
    """Return the energy of one picture on this machine."""
    found = measure_energy(artifact, images_NCHW)
    if found.energy_mj is not None:
        return found
    device = device_of(run)
    if device is None or device.power is None or not device.is_this_machine:
        return not_measured(found.source)
    single = min(latency.measurements, key=lambda row: (row.batch_size, row.num_threads))
    return estimate_energy(
        watts=device.power.watts,
        source=device.power.source,
        milliseconds=single.p50_ms,
        num_images=single.batch_size,
    )
