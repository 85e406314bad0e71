"""Stage 3, operators that a backend lacks, one folder each.

Imports the stages up to ``graph_passes`` and the root package; the stages after it may import it.
"""
