"""Stage 7, measuring bundles and their peers.

Imports any other stage; only the command line imports it.
"""
