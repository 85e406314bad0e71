"""Stage 5, building and verifying a bundle.

Imports the stages up to ``calibration`` and the root package; ``runtime`` and ``bench`` may import it.
"""
