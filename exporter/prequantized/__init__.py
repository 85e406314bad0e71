"""Checkpoints whose weights are quantized already: one file a format.

A format says which tensors stand for a matrix, checks them, and gives the matrix as codes and scales
(:class:`~qwenforge.exporter.quantized_weights.QuantizedWeight`) over lazy tensors: nothing is unpacked before it is
written. The codes are the checkpoint's own, bit by bit; nothing is calibrated or rounded again.
"""
