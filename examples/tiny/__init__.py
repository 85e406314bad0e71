"""The parts of the recipe ``examples/train_tiny.py``, in the order in which it uses them."""
