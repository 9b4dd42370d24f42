"""Benchmarks with lm-evaluation-harness, on data of this machine or the Hub; a stopped evaluation continues.

In: a model and task names. Out: an `EvalReport`, also as JSON beside the model.
Read in this order: `plan` (what to run, checked), `runner` (models), `job_runner` (tasks of one model), `lm` (the model
as lm-eval sees it), `report`; `suites` lists our suites, `local_data` finds datasets, `sandbox` runs code of `passk`.
"""
