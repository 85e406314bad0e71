"""Quantization of the portable form: which matrices there are, what is done to each, and explicit Q/DQ nodes."""
