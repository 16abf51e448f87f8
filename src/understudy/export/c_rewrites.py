"""Rewrites of generated C code that save time on small cores and leave every result as it was."""

from __future__ import annotations

import re
from collections.abc import Collection

# The argument is a float, whose nearest integer is the same in both precisions. Cores without
# instructions for doubles call a library for each.
_DOUBLE_ROUNDING = re.compile(
    r"(?P<declared>\n +float scaled = [^\n]*;\n +float rounded = ref_scalar_f)64(?=_nearbyint\()"
)
# fmaxf and fminf are calls, for the sake of NaN; a comparison that fails on NaN takes the limit,
# too.
_CLAMP = re.compile(
    r"rounded = ref_scalar_f32_(?P<which>maximum|minimum)\(rounded, "
    r"(?P<limit>\(float\)-?[A-Z0-9_]+)\);"
)
_NEAREST = """static inline float ref_scalar_f32_nearbyint(float a) {
    return nearbyintf(a);
}"""
_FAST_NEAREST = """static inline float ref_scalar_f32_nearbyint(float a) {
#if !defined(__FAST_MATH__) && FLT_EVAL_METHOD == 0
    /* A float of 1.5 * 2^23 has no bits for a fraction: adding it rounds, half to even. */
    if (fabsf(a) <= 4194304.0f) {
        return (a + 12582912.0f) - 12582912.0f;
    }
#endif
    return nearbyintf(a);
}"""


_ZERO_POINT_OF_WEIGHT = re.compile(r" - \(int32_t\)\(weight_zero_point\[\w+\]\)")


def rewrite(code: str, *, operators: Collection[str], symmetric_weights: bool) -> str:
    """Return the code with cheaper rounding, clamping and products of quantised values.

    Args:
        operators: the network's. Where ``Round`` is among them, rounding is left alone, because
            the cheap way loses the sign of a zero, which no other operator keeps.
        symmetric_weights: whether all zero points of convolutions' weights are 0. Their subtraction
            is a quarter of the instructions on a Cortex-M4.
    """
    if symmetric_weights:
        code = _ZERO_POINT_OF_WEIGHT.sub("", code)
    code = _DOUBLE_ROUNDING.sub(r"\g<declared>32", code)
    code = _CLAMP.sub(_compare, code)
    if "ref_scalar_f32_nearbyint(" in code and "Round" not in operators:
        code = _with_fast_nearest(code)
    return code


def _compare(clamp: re.Match[str]) -> str:
    sign = ">" if clamp["which"] == "maximum" else "<"
    return f"rounded = rounded {sign} {clamp['limit']} ? rounded : {clamp['limit']};"


def _with_fast_nearest(code: str) -> str:
    if _NEAREST in code:
        return code.replace(_NEAREST, _FAST_NEAREST)
    # A network without float rounding of its own got it from _DOUBLE_ROUNDING alone.
    return re.sub(
        r"^static inline ",
        lambda _: f"{_FAST_NEAREST}\n\nstatic inline ",
        code,
        count=1,
        flags=re.M,
    )
