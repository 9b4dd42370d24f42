"""From a dense model to a routed one without training: text, fit, measurement along the dial of γ, report.

In: a dense model and some text. Out: a model folder with a report of what each saving costs.
"""
