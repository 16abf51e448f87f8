import itertools

import pytest

from understudy.errors import ModelError
from understudy.export.c_memory import plan_memory, read_entry

GENERATED = """
/*
 * OpType: Conv
 * Name: first
 */
EMX_NODE_FN void conv(const float input[4][8], float output[8][8]) {
}
/*
 * OpType: Relu
 * Name: second
 */
EMX_NODE_FN void relu(const float input[8][8], float output[8][8]) {
}
/*
 * OpType: Add
 * Name: third
 */
EMX_NODE_FN void add(const float a[8][8], const float b[8][8], float output[8][8]) {
}
/*
 * OpType: QuantizeLinear
 */
EMX_NODE_FN void quantize(const float input[8][8], uint8_t output[8][8]) {
}
/*
 * OpType: Gemm
 */
EMX_NODE_FN void gemm(const uint8_t input[8][8], float output[4]) {
}
"""
BODY = """    float a[8][8];
    float b[8][8];
    float c[8][8];
    float d[8][8];
    uint8_t e[8][8];
    conv(images, a);
    relu(a, b);
    add(a, b, c);
    relu(c, d);
    quantize(d, e);
    gemm(e, logits);
"""


PARAMETERS = "const float images[4][8], float logits[4]"


def test_memory_is_shared_only_by_what_is_not_alive_together():
    entry = read_entry(GENERATED, PARAMETERS, BODY)
    plan = plan_memory(entry)
    lives, places = {}, {}
    for name, (block, start) in plan.offsets.items():
        uses = [i for i, call in enumerate(entry.calls) if name in call.arguments]
        # From the moment after it is written to the call that reads it last.
        lives[name] = (uses[0] + 0.5, uses[-1])
        places[name] = (block, start, start + entry.intermediates[name].num_bytes)
    for one, other in itertools.combinations(plan.offsets, 2):
        alive = max(lives[one][0], lives[other][0]) <= min(lives[one][1], lives[other][1])
        (block, start, end), (other_block, other_start, other_end) = places[one], places[other]
        overlap = block == other_block and start < other_end and other_start < end
        assert not (alive and overlap), f"{one} and {other}"
    # A result may lie where its operand lay only if each element is made of that element alone:
    # quantisation reads four bytes for each that it writes.
    assert plan.offsets["c"] == plan.offsets["d"]
    _, d_start, d_end = places["d"]
    _, e_start, e_end = places["e"]
    assert e_end <= d_start or d_end <= e_start
    assert plan.num_bytes == 2 * 256


def test_generated_code_that_is_not_known_is_an_error():
    with pytest.raises(ModelError, match=r"line 'float \*p = malloc\(3\);'"):
        read_entry(GENERATED, PARAMETERS, "    float *p = malloc(3);")
