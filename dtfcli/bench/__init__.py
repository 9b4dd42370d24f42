"""Time and memory of each architecture next to dense, in one process, taking turns.

In: models. Out: result dataclasses. `inference` measures prefill and decoding, `steps` training.
"""
