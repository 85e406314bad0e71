"""Stage 2, rewriting graphs: fusion, lowering, and the verification of both.

Imports ``exporter`` and the root package; the stages after it may import it.
"""
