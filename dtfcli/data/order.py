"""The order in which blocks are trained on: a pure function of seed and step, so that resuming needs no state."""

import hashlib
from functools import lru_cache

import numpy as np


def frozen_generator(content: str) -> np.random.RandomState:
    """NumPy's legacy generator, whose stream is frozen across versions, seeded by a text."""
    state = hashlib.blake2b(content.encode(), digest_size=32).digest()
    return np.random.RandomState(np.frombuffer(state, dtype="<u4"))


@lru_cache(maxsize=4)
def epoch_order(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the blocks in one epoch: a permutation (int64, read-only), a function of its arguments."""
    order = frozen_generator(f"epoch {epoch} of seed {seed}").permutation(num_blocks)
    order.flags.writeable = False
    return order


def update_indices(step: int, *, num_blocks: int, blocks_per_update: int, seed: int) -> np.ndarray:
    """The blocks of optimizer step `step` (from 0): int64 [blocks_per_update], a function of its arguments.

    Steps walk through one epoch after the other without leaving a block out; an update may span epochs.
    """
    positions = np.arange(step * blocks_per_update, (step + 1) * blocks_per_update)
    indices = np.empty(blocks_per_update, dtype=np.int64)
    for epoch in range(positions[0] // num_blocks, positions[-1] // num_blocks + 1):
        here = positions // num_blocks == epoch
        indices[here] = epoch_order(num_blocks, seed, int(epoch))[positions[here] % num_blocks]
    return indices
