"""Stage 1, from a checkpoint to a traced graph and its weight plan.

Imports the root package only; every later stage may import it.
"""
