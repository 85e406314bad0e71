"""Fusion rules, one a file, that bring a traced graph to the portable form; ``graph_passes.pipeline`` runs them."""
