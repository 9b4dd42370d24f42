"""What a model costs before and while it runs: parameters, FLOPs, memory, the machine's peak.

In: a model or settings. Out: numbers.
"""
