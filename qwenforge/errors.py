"""The errors a user can mend.

``UserError`` carries one sentence that says what is wrong, where, and what to do; the command line prints it
without a traceback and exits 1. Anything else that escapes is an internal error and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside qwenforge is wrong; the message says what, where and how to mend it."""


class CheckpointError(UserError):
    """A checkpoint folder is incomplete, damaged or of an unsupported kind."""


class UnsupportedError(UserError):
    """The input is well-formed but asks for something that is refused by name."""


class GraphError(UserError):
    """An ONNX graph cannot be read or rewritten as asked."""


class VerificationError(UserError):
    """A result differs from its reference by more than its bound."""


class BundleError(UserError):
    """A bundle is incomplete, tampered with or of a newer schema."""


class AccuracyError(VerificationError):
    """A quantized model is further from the unquantized one than its budget allows."""
