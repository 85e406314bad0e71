"""The command line: one module per verb; may import every stage, but only inside a command's ``run``."""
