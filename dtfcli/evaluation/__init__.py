"""Benchmarks: lm-evaluation-harness as the engine, on data of this machine or the Hub, resumed where it was stopped."""
