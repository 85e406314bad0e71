"""The tolerances of the tests, one place, each justified; bounds that the product enforces live beside the product."""

from __future__ import annotations

FLOAT32_EXACT = 1e-6
"""The same fp32 operations in the same order, relative: a few units in the last place."""

FLOAT32_REORDERED = 1e-5
"""fp32 sums of up to a few thousand terms in another order, relative to the output's scale: sqrt(4096) * 2^-24 * 2."""

FLOAT32_MODEL = 2e-4
"""Logits of a whole fp32 model against another implementation, absolute: reordered sums through tens of layers."""

FLOAT16 = 4e-3
"""One fused fp16 operator against fp32, relative: four units in the last place (2^-10) of an fp16 number."""

BFLOAT16 = 3e-2
"""One fused bf16 operator against fp32, relative: four units in the last place (2^-7) of a bf16 number."""

FLOAT8 = 4e-2
"""One fused operator with E4M3 activations against the same rounding in float64, relative: a few of a sum's 64 terms
may fall to the other side of an edge, each by an eighth of itself, and the result is rounded to bf16."""

QUANTIZED_MODEL = 2e-2
"""Logits of a whole model with quantized activations against the same in float64, relative norm: sums in another order
put a few activations of a thousand on the other side of a rounding edge, each by one step of 1/127 (E4M3: 1/8)."""

INT8_ACTIVATIONS = 2e-2
"""A product whose activations were rounded to int8 by block or token, relative: 1/254 of the largest, over a few
products in a row, of values of which the largest is some three times the typical one."""
