"""A released page: proved and measured by a real browser, which answers the whole test split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from understudy.evaluate.browser import run_in_browser
from understudy.export.artifact_parity import (
    ArtifactParity,
    parity_of_logits,
    require_artifact_parity,
)
from understudy.export.parity import model_logits
from understudy.export.target import Artifact, ExportSource
from understudy.recipes.run import Run


def in_browser(
    run: Run, source: ExportSource, artifact: Artifact
) -> tuple[Tensor, ArtifactParity, dict[str, Any]]:
    """Return the page's answers on the test split, their parity with the network, and the times.

    Raises:
        InputError: no browser is installed.
        MissingExtraError: playwright is not installed.
        ParityError: the page does not answer as the network does.
    """
    images_NCHW = run.source.images(run.splits.test)
    found = run_in_browser(artifact, images_NCHW.numpy())
    logits_NK = torch.from_numpy(found.logits_NK)
    some_NCHW = images_NCHW[: run.recipe.export.num_parity_images]
    parity = parity_of_logits(
        artifact,
        model_logits(source.model, some_NCHW),
        logits_NK[: len(some_NCHW)],
        # One picture at a time is how the page answers all of them.
        logits_NK[:1],
        tolerance=run.recipe.export.parity_tolerance,
        min_agreement=run.recipe.release.min_agreement,
    )
    require_artifact_parity(parity, artifact)
    times = {
        "p50_ms": found.latency_p50_ms,
        "p95_ms": found.latency_p95_ms,
        "load_ms": found.load_ms,
        "num_runs": found.num_runs,
        "browser": found.browser,
    }
    return logits_NK, parity, {"browser": times}
