"""QwenForgeMoE: its specification (op.yaml), its kernels, and the packing of its weights."""
