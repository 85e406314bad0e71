"""Stage 4, value ranges and recipes for quantization.

Imports the stages up to ``plugins`` and the root package; the stages after it may import it.
"""
