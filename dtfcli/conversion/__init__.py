"""From a dense model to a routed one: text, fit, recovery if asked, measurement along the dial of γ, report.

In: a dense model and some text. Out: a model folder with a report of what each saving costs.
"""
