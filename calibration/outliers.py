"""Channels that are far larger than others: what makes one scale for many channels a bad one, named for the user."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from qwenforge.calibration.work_folder import Outlier

Array = npt.NDArray[Any]

OUTLIER_RATIO = 100.0
"""Of a channel's largest magnitude to the median channel's; what has less is common in trained models."""
_NAMED = 3


def outliers(largest: Array, site: str, of: str) -> list[Outlier]:
    """The most extreme channels, at most three, of the largest magnitudes [K] of a site's channels."""
    median = float(np.median(largest))
    if median <= 0:
        return []
    order = np.argsort(-largest, kind="stable")[:_NAMED]
    ratios = [(int(channel), float(largest[channel]) / median) for channel in order]
    return [
        Outlier(site=site, channel=channel, ratio=ratio, of=of) for channel, ratio in ratios if ratio >= OUTLIER_RATIO
    ]


def outlier_warnings(found: Iterable[Outlier]) -> list[str]:
    """A sentence for each outlier."""
    return [
        f"channel {outlier.channel} of {outlier.site}'s {outlier.of.split()[0]}"
        + (f" ({outlier.of.split()[1]}s)" if " " in outlier.of else "")
        + f" is {outlier.ratio:.0f} times as large as the median channel"
        for outlier in found
    ]
