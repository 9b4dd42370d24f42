"""Time and memory of each architecture next to dense, in one process, taking turns.

In: models and `BenchOptions`. Out: a `BenchReport`.
`run` puts the phases together: `steps` measures training, `inference` prefill and decoding.
"""
