"""What a verb of the command line is.

A verb lives in ``qwenforge/cli/<verb>.py``, which defines exactly one subclass of :class:`Command` and is listed in
``qwenforge.cli.main.VERBS``. Its module is imported only when the verb is used, and heavy libraries only in ``run``.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Command(ABC):
    """One verb.

    Attributes:
        name: the verb as typed.
        help: one line for the list of verbs; the same line as in ``qwenforge.cli.main.VERBS``.
        description: a short paragraph that opens the verb's ``--help``.
        example: one or more command lines, shown at the end of ``--help``.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[str]

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments on ``parser``; imports nothing heavy."""

    @abstractmethod
    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code: 0 done, 1 a bound was missed.

        Raises:
            UserError: the user can mend what is wrong; printed as one sentence, exit code 1.
        """
