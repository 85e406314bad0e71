"""TensorRT engines of a bundle: building, recording, checking and looking at them.

``build.build_engine`` is the way in. NVIDIA's Python modules are imported only where one is used; nothing here needs
PyTorch.
"""
