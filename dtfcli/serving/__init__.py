"""Transformers' own server (`transformers serve`), OpenAI style, for every model that `dtf generate` opens.

`server` runs it with a model of ours, `access` asks for the key, `requests` lets in what the server can answer,
`batches` computes many answers at once.
"""
