"""Benchmarks with lm-evaluation-harness, on data of this machine or the Hub; a stopped evaluation continues.

In: a model and task names. Out: an `EvalReport`, also as JSON beside the model.
"""
