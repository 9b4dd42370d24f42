"""The models. Flat and uploadable: every file here but `routing_naive` travels with a saved model.

Files import the standard library, torch, transformers and their siblings, nothing else of `dtfcli`.
Read them in this order: `configuration_fields`, `routing`, `layers`, `modeling_dynamic`, `conversion`.
"""
