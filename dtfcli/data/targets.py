"""Which tokens of packed rows are targets of the loss: kept in the rows themselves.

A token that is not a target (a user's turn, the scaffolding of a chat template) is stored as its complement ~id, a
negative number. Rows stay one int32 array for the cache, the streams and the plan, whatever they were made of.
"""

import numpy as np

from dtfcli.models.losses import IGNORE_INDEX


def with_targets(ids: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Ids and a mask of the same shape as one array."""
    return np.where(is_target, ids, ~ids).astype(np.int32)


def token_ids(rows: np.ndarray) -> np.ndarray:
    """The ids alone: int64 of the same shape."""
    rows = rows.astype(np.int64)
    return np.where(rows < 0, ~rows, rows)


def target_labels(rows: np.ndarray) -> np.ndarray:
    """Labels as models take them, not shifted: int64 of the same shape, -100 where a token is not a target."""
    rows = rows.astype(np.int64)
    return np.where(rows < 0, IGNORE_INDEX, rows)


def count_targets(rows: np.ndarray) -> int:
    """Targets of next-token prediction in rows [N, T]: the first token of a row is predicted from nothing."""
    return int(np.count_nonzero(rows[:, 1:] >= 0))
