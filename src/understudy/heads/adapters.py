"""Light adapters between a student's features and a teacher's, trained with the student.

Shapes are those of ``models.taps``, without the batch: a map (C, H, W), tokens (T, C) or a vector
(D,). An adapter changes widths; ``match_positions`` settles unequal resolutions without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from understudy.errors import ModelError, problem
from understudy.models.taps import FeatureKind, as_kind, tokens_to_map

Shape = tuple[int, ...]
AdapterKind = Literal["auto", "conv1x1", "linear", "none"]

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)
_FORMS = {1: "a vector", 2: "tokens", 3: "a map"}


def build_adapter(
    kind: AdapterKind, student_shape: Shape, teacher_shape: Shape, *, where: str
) -> nn.Module:
    """Return a module from the student's features to the teacher's width; positions stay.

    Weights are drawn from torch's global generator (He et al. 2015, "Delving Deep into
    Rectifiers", for a linear output), biases are zero.

    Args:
        kind: "conv1x1" for maps, "linear" for tokens and vectors; "auto": whichever of the two
            fits, and nothing where the widths are equal; "none": nothing, so the widths must be
            equal. A loss that takes unequal widths needs no adapter and should not ask for one.
        student_shape: without the batch.
        teacher_shape: without the batch. Maps and tokens may meet, vectors only vectors.
        where: what the user has to change, at the start of an error.

    Raises:
        ModelError: the kind does not fit the student's shape, or the shapes never meet.
    """
    problems = _shape_problems(student_shape, teacher_shape)
    if not problems:
        problems = _kind_problems(kind, student_shape, teacher_shape)
    if problems:
        raise ModelError(*(f"{where}: {text}" for text in problems))
    resolved = _resolved(kind, student_shape, teacher_shape)
    widths = _width(student_shape), _width(teacher_shape)
    if resolved == "none":
        return nn.Identity()
    return _kaiming(nn.Conv2d(*widths, 1) if resolved == "conv1x1" else nn.Linear(*widths))


def match_positions(
    student: Tensor, teacher: Tensor, *, kind: FeatureKind = "map"
) -> tuple[Tensor, Tensor]:
    """Bring two features to the same positions, without weights.

    The larger height and the larger width are average-pooled (adaptively) to the smaller. Tokens
    of unequal number, and tokens beside a map, are laid out as a map first (``tokens_to_map``).
    What agrees already, and vectors, are returned as they are.

    Args:
        student: a map [N, C, H, W], tokens [N, T, C], a vector [N, D], or with kind "attention" a
            map or an attention map [N, H, W].
        teacher: likewise; any other width.
        kind: what a tensor of three dimensions is: tokens for "map", else an attention map.

    Raises:
        ModelError: a vector beside something with positions, or tokens of no square grid.
    """
    num_dims = student.dim(), teacher.dim()
    if num_dims == (2, 2):
        return student, teacher
    if min(num_dims) < 3 or max(num_dims) > 4:
        raise ModelError(_never_meet(tuple(student.shape), tuple(teacher.shape)))
    if kind == "attention":
        size = _smaller(student.shape[-2:], teacher.shape[-2:])
        return _pooled_to(student, size), _pooled_to(teacher, size)
    if num_dims == (3, 3) and student.shape[1] == teacher.shape[1]:
        return student, teacher
    student, teacher = (x if x.dim() == 4 else tokens_to_map(x) for x in (student, teacher))
    size = _smaller(student.shape[-2:], teacher.shape[-2:])
    return _pooled_to(student, size), _pooled_to(teacher, size)


def describe_match(
    student_shape: Shape,
    teacher_shape: Shape,
    kind: AdapterKind = "auto",
    *,
    features: FeatureKind = "map",
) -> str:
    """Return in one sentence how two shapes (without the batch) are made to meet, "" if they do.

    Args:
        student_shape: as tapped, of kind ``features``.
        teacher_shape: likewise.
        kind: the adapter; "none" also where a loss takes unequal widths.
        features: with "attention" a shape of two numbers is (H, W), otherwise tokens (T, C).

    Raises:
        ModelError: they never meet.
    """
    steps = []
    if features != "attention":
        problems = _shape_problems(student_shape, teacher_shape)
        if problems:
            raise ModelError(*problems)
        adapter = _resolved(kind, student_shape, teacher_shape)
        widths = f"from {_width(student_shape)} to {_width(teacher_shape)} channels"
        names = {"conv1x1": "a 1x1 convolution", "linear": "a linear layer"}
        if adapter in names:
            steps.append(f"{names[adapter]} brings the student {widths}")
    # Positions are settled by the very function that settles them in training.
    given = [torch.empty(1, *shape, device="meta") for shape in (student_shape, teacher_shape)]
    found = match_positions(given[0], given[1], kind=features)
    for name, before, after in zip(("student", "teacher"), given, found, strict=True):
        if before.dim() == 3 and after.dim() == 4:
            steps.append(f"the {name}'s {before.shape[1]} tokens are laid out as a map")
            before = tokens_to_map(before)
        if before.shape[-2:] != after.shape[-2:]:
            sizes = " to ".join(f"{x.shape[-2]}x{x.shape[-1]}" for x in (before, after))
            steps.append(f"the {name}'s positions are average-pooled from {sizes}")
    if not steps:
        return ""
    shapes = f"student {list(student_shape)}, teacher {list(teacher_shape)}"
    return f"{shapes}: {'; '.join(steps)}."


class Embedder(nn.Module):
    """A linear layer onto the unit sphere, as in Tian et al. 2020 ("Contrastive Representation
    Distillation", section 3.2 and its code's ``Embed``).

    Args:
        in_features: width of a vector [N, D], a map or tokens; positions are averaged.
        out_features: D of the output, float32 [N, D] of Euclidean length 1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = _kaiming(nn.Linear(in_features, out_features))

    def forward(self, features: Tensor) -> Tensor:
        embedding_ND: Tensor = self.linear(as_kind(features, "pooled"))
        return F.normalize(embedding_ND, dim=1)


class ReviewFusion(nn.Module):
    """Fuses a student's layers, the deepest first, into maps of the teacher's shapes.

    Each level is brought to ``mid_channels``; what the deeper levels gave is enlarged to its
    resolution and mixed in with two attention maps; a 3x3 convolution leads to the teacher's width
    (attention based fusion, Chen, Liu, Zhao and Jia 2021, "Distilling Knowledge via Knowledge
    Review", section 3.3 and figure 3). The output is resized to the teacher's resolution: nearest
    pixels where it grows, as in the paper, averages where it shrinks.

    Args:
        student_shapes: (C, H, W) without the batch, shallow to deep; a vector (D,) is a map of one
            pixel.
        teacher_shapes: as many, of the layers they learn from.
        mid_channels: width at which levels are fused.

    Raises:
        ModelError: lists of other lengths, none at all, or tokens.
    """

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, mid_channels: int
    ) -> None:
        super().__init__()
        shapes = [*student_shapes, *teacher_shapes]
        if (
            not student_shapes
            or len(student_shapes) != len(teacher_shapes)
            or any(len(shape) not in (1, 3) for shape in shapes)
        ):
            raise ModelError(
                problem(
                    f"student layers of shapes {[list(s) for s in student_shapes]} and teacher "
                    f"layers of shapes {[list(s) for s in teacher_shapes]}",
                    expected="as many of both, each a map [C, H, W] or a vector [D]",
                    mend="Name a teacher's layer for each of the student's, shallow to deep.",
                )
            )
        self.teacher_shapes = [tuple(shape) for shape in teacher_shapes]
        self.levels = nn.ModuleList(
            _FusionLevel(
                _width(student_shape),
                mid_channels,
                _width(teacher_shape),
                fuses=number + 1 < len(student_shapes),
            )
            for number, (student_shape, teacher_shape) in enumerate(
                zip(student_shapes, teacher_shapes, strict=True)
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return maps [N, C, H, W] (or vectors) in the teachers' shapes, shallow to deep.

        Args:
            maps: the student's [N, C, H, W], shallow to deep.
        """
        deeper: Tensor | None = None
        outputs: list[Tensor] = []
        levels = list(zip(self.levels, maps, self.teacher_shapes, strict=True))
        for level, features, teacher_shape in reversed(levels):
            features_NCHW = features if features.dim() == 4 else features[:, :, None, None]
            size = teacher_shape[1:] or (1, 1)
            output, deeper = level(features_NCHW, deeper, size)
            outputs.append(output.view(len(output), *teacher_shape))
        return outputs[::-1]


class _FusionLevel(nn.Module):
    """One level of ``ReviewFusion``: returns (the teacher's shape, what shallower levels get)."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuses: bool):
        super().__init__()
        self.enter = nn.Sequential(
            _kaiming(nn.Conv2d(in_channels, mid_channels, 1, bias=False)),
            nn.BatchNorm2d(mid_channels),
        )
        self.leave = nn.Sequential(
            _kaiming(nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)),
            nn.BatchNorm2d(out_channels),
        )
        self.attention = _kaiming(nn.Conv2d(2 * mid_channels, 2, 1)) if fuses else None

    def forward(
        self, features_NCHW: Tensor, deeper_NMHW: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        fused_NMHW: Tensor = self.enter(features_NCHW)
        if self.attention is not None and deeper_NMHW is not None:
            deeper = F.interpolate(deeper_NMHW, fused_NMHW.shape[2:], mode="nearest")
            both = torch.cat([fused_NMHW, deeper], dim=1)
            own_share, deeper_share = self.attention(both).sigmoid().split(1, dim=1)
            fused_NMHW = fused_NMHW * own_share + deeper * deeper_share
        return self.leave(_resized_to(fused_NMHW, size)), fused_NMHW


# Shapes


def _width(shape: Shape) -> int:
    return shape[1] if len(shape) == 2 else shape[0]


def _resolved(kind: AdapterKind, student_shape: Shape, teacher_shape: Shape) -> AdapterKind:
    if kind != "auto":
        return kind
    if _width(student_shape) == _width(teacher_shape):
        return "none"
    return "conv1x1" if len(student_shape) == 3 else "linear"


def _shape_problems(student_shape: Shape, teacher_shape: Shape) -> list[str]:
    num_dims = len(student_shape), len(teacher_shape)
    if not all(1 <= count <= 3 for count in num_dims) or (1 in num_dims and num_dims != (1, 1)):
        return [_never_meet(student_shape, teacher_shape)]
    return []


def _never_meet(student_shape: Shape, teacher_shape: Shape) -> str:
    return problem(
        f"student features of shape {list(student_shape)} and teacher features of shape "
        f"{list(teacher_shape)}",
        expected="both with positions (maps or tokens), or both vectors",
        mend="Take both pooled, or tap other layers.",
    )


def _kind_problems(kind: str, student_shape: Shape, teacher_shape: Shape) -> list[str]:
    form = _FORMS[len(student_shape)]
    given = f"adapter {kind!r} for student features of shape {list(student_shape)}, {form}"
    if kind not in get_args(AdapterKind):
        known = ", ".join(get_args(AdapterKind))
        return [problem(f"adapter {kind!r}", expected=f"one of {known}", mend="Correct it.")]
    if kind == "none" and _width(student_shape) != _width(teacher_shape):
        return [
            problem(
                f"{given}, beside a teacher's of shape {list(teacher_shape)}",
                expected=f"equal widths, not {_width(student_shape)} and {_width(teacher_shape)}",
                mend="Choose adapter auto, or layers of one width.",
            )
        ]
    if (kind == "conv1x1" and form != "a map") or (kind == "linear" and form == "a map"):
        fitting = "linear" if kind == "conv1x1" else "conv1x1"
        mend = f"Choose {fitting} or auto."
        return [problem(given, expected="conv1x1 for a map, linear for the others", mend=mend)]
    return []


# Sizes and weights


def _smaller(size: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    return min(size[0], other[0]), min(size[1], other[1])


def _pooled_to(features: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(features.shape[-2:]) == size:
        return features
    return F.adaptive_avg_pool2d(features, size)


def _resized_to(features_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    pooled = _pooled_to(features_NCHW, _smaller(features_NCHW.shape[2:], size))
    if tuple(pooled.shape[2:]) == size:
        return pooled
    return F.interpolate(pooled, size, mode="nearest")


def _kaiming(layer: Layer) -> Layer:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
