"""A one-layer attention model of 16 tokens in both forms of signature, written by hand: growing and in place."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

_PROJECTIONS = """
  x = Gather(embedding, input_ids)
  q_flat = MatMul(x, wq)
  k_flat = MatMul(x, wk)
  v_flat = MatMul(x, wv)
  heads = Constant<value_ints=[0, 0, 2, 4]>()
  q_split = Reshape(q_flat, heads)
  k_split = Reshape(k_flat, heads)
  v_split = Reshape(v_flat, heads)
  q_heads = Transpose<perm=[0, 2, 1, 3]>(q_split)
  k_heads = Transpose<perm=[0, 2, 1, 3]>(k_split)
  v = Transpose<perm=[0, 2, 1, 3]>(v_split)
  q = RotaryEmbedding(q_heads, cos, sin, position_ids)
  k = RotaryEmbedding(k_heads, cos, sin, position_ids)
"""

_ATTENTION = """
  k_t = Transpose<perm=[0, 1, 3, 2]>(present_0)
  products = MatMul(q, k_t)
  scores = Add(products, mask)
  weights = Softmax<axis=-1>(scores)
  y_heads = MatMul(weights, present_1)
  y_split = Transpose<perm=[0, 2, 1, 3]>(y_heads)
  joined = Constant<value_ints=[0, 0, 8]>()
  y = Reshape(y_split, joined)
  residual = Add(x, y)
"""

_GROWING = f"""
<ir_version: 11, opset_import: ["" : 24]>
growing (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids,
         float[B,2,P,4] past_0, float[B,2,P,4] past_1)
     => (float[B,S,16] logits, float[B,2,T,4] present_0, float[B,2,T,4] present_1)
{{
{_PROJECTIONS}
  present_0 = Concat<axis=2>(past_0, k)
  present_1 = Concat<axis=2>(past_1, v)
  zero = Constant<value_int=0>()
  one = Constant<value_int=1>()
  past_shape = Shape<start=2, end=3>(past_0)
  past_length = Squeeze(past_shape)
  new_shape = Shape<start=1, end=2>(input_ids)
  new_length = Squeeze(new_shape)
  total = Add(past_length, new_length)
  queries_0 = Range(past_length, total, one)
  keys = Range(zero, total, one)
  last = Constant<value_ints=[1]>()
  queries = Unsqueeze(queries_0, last)
  causal = LessOrEqual(keys, queries)
  visible_2d = Cast<to=9>(attention_mask)
  axes = Constant<value_ints=[1, 2]>()
  visible = Unsqueeze(visible_2d, axes)
  seen = And(causal, visible)
  far = Constant<value_float=-1e30>()
  near = Constant<value_float=0.0>()
  mask = Where(seen, near, far)
{_ATTENTION}
  logits = MatMul(residual, head)
}}
"""

_IN_PLACE = f"""
<ir_version: 11, opset_import: ["" : 24]>
in_place (int64[B,S] input_ids, int64[B,S] position_ids, int64[B] cache_position, int64[B,N] logits_index,
          float[B,2,M,4] past_0, float[B,2,M,4] past_1)
      => (float[B,N,16] logits, float[B,2,M,4] present_0, float[B,2,M,4] present_1)
{{
{_PROJECTIONS}
  present_0 = TensorScatter<axis=2>(past_0, k, cache_position)
  present_1 = TensorScatter<axis=2>(past_1, v, cache_position)
  zero = Constant<value_int=0>()
  one = Constant<value_int=1>()
  capacity_shape = Shape<start=2, end=3>(past_0)
  capacity = Squeeze(capacity_shape)
  new_shape = Shape<start=1, end=2>(input_ids)
  new_length = Squeeze(new_shape)
  steps_0 = Range(zero, new_length, one)
  keys = Range(zero, capacity, one)
  last = Constant<value_ints=[1]>()
  steps = Unsqueeze(steps_0, last)
  row_axes = Constant<value_ints=[1, 2, 3]>()
  first = Unsqueeze(cache_position, row_axes)
  queries = Add(first, steps)
  seen = LessOrEqual(keys, queries)
  far = Constant<value_float=-1e30>()
  near = Constant<value_float=0.0>()
  mask = Where(seen, near, far)
{_ATTENTION}
  deep = Constant<value_ints=[-1]>()
  indices = Unsqueeze(logits_index, deep)
  chosen = GatherND<batch_dims=1>(residual, indices)
  logits = MatMul(chosen, head)
}}
"""

_CACHES = {"past_0": "past_key_values.0.key", "past_1": "past_key_values.0.value"} | {
    "present_0": "present.0.key",
    "present_1": "present.0.value",
}


def toy_attention(form: Literal["growing", "in_place"], *, named: bool = True) -> ir.Model:
    """The model in ``form``; caches are called past_0, past_1, present_0, present_1 unless ``named``."""
    proto = onnx.parser.parse_model(_GROWING if form == "growing" else _IN_PLACE)
    random = np.random.default_rng(0)
    angles = np.arange(64)[:, None] * np.array([1.0, 0.1])
    weights = {
        "embedding": random.standard_normal((16, 8)),
        "wq": random.standard_normal((8, 8)) * 0.4,
        "wk": random.standard_normal((8, 8)) * 0.4,
        "wv": random.standard_normal((8, 8)) * 0.4,
        "head": random.standard_normal((8, 16)),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    model = ir.from_proto(proto)
    if named:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.name = _CACHES.get(str(value.name), value.name)
    return model
