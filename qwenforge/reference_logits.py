"""Reference logits: what the verified model said for a few prompts, kept small enough to travel in the bundle.

An engine's first run on its device feeds the same tokens and compares: a wrong kernel, a wrong driver or a wrong plugin
shows before any text is trusted. For a few positions of each prompt the largest logits are kept, with their token ids
and the logarithm of the whole row's sum of exponentials, which makes probabilities and KL computable from the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_TOP = 32


@dataclass(frozen=True)
class ReferenceLogits:
    """References of one prompt of S tokens at N of its positions, K logits each.

    ``token_ids`` [S]; ``positions`` [N], where ``logits`` row n predicts the token after ``positions[n]``;
    ``top_ids`` [N, K] in falling order of logit; ``top_logits`` [N, K] fp32; ``logsumexp`` [N]; ``greedy_tokens``, the
    tokens that greedy decoding adds to the prompt (may be empty).
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logits: tuple[tuple[float, ...], ...]
    logsumexp: tuple[float, ...]
    greedy_tokens: tuple[int, ...] = ()

    @classmethod
    def from_logits(
        cls,
        token_ids: Sequence[int],
        positions: Sequence[int],
        logits: NDArray[np.floating[Any]],
        *,
        greedy_tokens: Sequence[int] = (),
        top: int = DEFAULT_TOP,
    ) -> ReferenceLogits:
        """Keep the ``top`` largest of ``logits`` [N, V], the rows for ``positions`` of the prompt ``token_ids``.

        Raises ValueError on shapes that do not fit or logits that are not finite.
        """
        rows = np.asarray(logits, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[0] != len(positions):
            raise ValueError(f"logits of shape {rows.shape} do not have one row for each of {len(positions)} positions")
        if not np.isfinite(rows).all():
            raise ValueError("reference logits must be finite")
        if any(not 0 <= position < len(token_ids) for position in positions):
            raise ValueError(f"positions {list(positions)} do not all lie in a prompt of {len(token_ids)} tokens")
        order = np.argsort(-rows, axis=1, kind="stable")[:, :top]
        values = np.take_along_axis(rows, order, axis=1)
        wide = rows.astype(np.float64)
        largest = wide.max(axis=1, keepdims=True)
        sums = np.log(np.exp(wide - largest).sum(axis=1)) + largest[:, 0]
        return cls(
            token_ids=tuple(int(token) for token in token_ids),
            positions=tuple(int(position) for position in positions),
            top_ids=tuple(tuple(row) for row in order.tolist()),
            top_logits=tuple(tuple(row) for row in values.tolist()),
            logsumexp=tuple(sums.tolist()),
            greedy_tokens=tuple(int(token) for token in greedy_tokens),
        )

    def max_abs_error(self, logits: NDArray[np.floating[Any]]) -> float:
        """Largest difference between the kept logits and the same entries of ``logits`` [N, V]; NaN counts as infinite.

        Raises ValueError when ``logits`` does not have N rows or is too narrow for the kept token ids.
        """
        rows = np.asarray(logits, dtype=np.float64)
        ids = np.asarray(self.top_ids)
        if rows.ndim != 2 or rows.shape[0] != len(self.positions) or ids.max(initial=-1) >= rows.shape[1]:
            raise ValueError(f"logits of shape {rows.shape} do not fit references for {len(self.positions)} positions")
        errors = np.abs(np.take_along_axis(rows, ids, axis=1) - np.asarray(self.top_logits))
        return float(np.where(np.isnan(errors), np.inf, errors).max(initial=0.0))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; fp32 logits survive the round trip exactly."""
        return {
            "token_ids": list(self.token_ids),
            "positions": list(self.positions),
            "top_ids": [list(row) for row in self.top_ids],
            "top_logits": [list(row) for row in self.top_logits],
            "logsumexp": list(self.logsumexp),
            "greedy_tokens": list(self.greedy_tokens),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ReferenceLogits:
        """The inverse of :meth:`to_json`; KeyError or TypeError on fields it did not write."""
        return cls(
            token_ids=tuple(fields["token_ids"]),
            positions=tuple(fields["positions"]),
            top_ids=tuple(tuple(row) for row in fields["top_ids"]),
            top_logits=tuple(tuple(row) for row in fields["top_logits"]),
            logsumexp=tuple(fields["logsumexp"]),
            greedy_tokens=tuple(fields["greedy_tokens"]),
        )
