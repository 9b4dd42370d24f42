"""The one place that builds and opens models.

In: settings, or a path that names a model. Out: a model and its tokenizer.
`source` finds out what MODEL means, `build` makes a model from settings, `load` opens one, `adapters` is LoRA,
`quantization` stores weights in fewer bits.
"""

from dtfcli.quiet import quiet_imports

quiet_imports()
