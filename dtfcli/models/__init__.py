"""The models. `modeling_dynamic` and the files that it imports travel with every saved model.

In: a config, or a dense model to convert. Out: a routed model of Transformers.
Files import the standard library, torch, transformers and their siblings, nothing else of `dtfcli`.
Read in this order: `routing` (the idea as functions; `routing_naive` as loops), `configuration_fields` (all fields,
and `WAYS` of choosing), `router` and a way of choosing (`cost` and `forecast`; then `mod`, `surprise`, `layerdrop`),
`layers`, `stack`, `causal_lm`; then `cache`, `calibration` and `fitting`, `conversion` (dense ↔ routed), `families`.
Routed MLPs stand alone: `modeling_routed_mlp` (any decoder of Transformers), `mlp_survey`, `mlp_fitting`, `savings`.
"""
