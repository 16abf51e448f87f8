"""A released page: proved and measured by a real browser, which answers the whole test split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from understudy.data.splits import spread
from understudy.errors import ParityError, problem
from understudy.evaluate.browser import run_in_browser
from understudy.export.artifact_parity import (
    ArtifactParity,
    parity_of_logits,
    require_artifact_parity,
)
from understudy.export.parity import model_logits
from understudy.export.target import Artifact, ExportSource, find_target
from understudy.recipes.artifacts import proved
from understudy.recipes.run import Run


def in_browser(
    run: Run, source: ExportSource, artifact: Artifact
) -> tuple[Tensor, ArtifactParity, dict[str, Any]]:
    """Return the page's answers on the test split, their parity with the network, and the times.

    Raises:
        InputError: no browser is installed.
        MissingExtraError: playwright is not installed.
        ParityError: the page does not answer as the network does; it says whether its ONNX file
            does in ONNX Runtime here, and if not, which layer is the first that differs.
    """
    images_NCHW = run.source.images(run.splits.test)
    found = run_in_browser(artifact, images_NCHW.numpy())
    logits_NK = torch.from_numpy(found.logits_NK)
    some_N = spread(torch.arange(len(images_NCHW)), run.recipe.export.num_parity_images)
    parity = parity_of_logits(
        artifact,
        model_logits(source.model, images_NCHW[some_N]),
        logits_NK[some_N],
        # One picture at a time is how the page answers all of them.
        logits_NK[:1],
        tolerance=run.recipe.export.parity_tolerance,
        min_agreement=run.recipe.release.min_agreement,
    )
    try:
        require_artifact_parity(parity, artifact)
    except ParityError as error:
        raise ParityError(*error.problems, where_to_look(run, source, artifact)) from None
    times = {
        "p50_ms": found.latency_p50_ms,
        "p95_ms": found.latency_p95_ms,
        "p99_ms": found.latency_p99_ms,
        "load_ms": found.load_ms,
        "num_runs": found.num_runs,
        "browser": found.browser,
    }
    return logits_NK, parity, {"browser": times}


def where_to_look(run: Run, source: ExportSource, artifact: Artifact) -> str:
    """Return whether the fault of a page is in its file or in the browser.

    The page's own ONNX file is run by ONNX Runtime in this process on the same pictures.
    """
    name = next(name for name in artifact.files if name.endswith(".onnx"))
    try:
        proved(run, source, find_target("onnx"), replace(artifact, target="onnx", files=(name,)))
    except ParityError as error:
        return f"the page's {name} itself is at fault: {'; '.join(error.problems)}"
    return problem(
        f"the page's {name} itself passes in ONNX Runtime here",
        expected="the fault in the browser or in onnxruntime-web",
        mend="Try another version of the browser, or leave this target out.",
    )
