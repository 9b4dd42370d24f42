"""Text → rows of tokens.

In: `data.sources` of the settings and a tokenizer. Out: `TokenizedData` (blocks on disk) or a `RowStream`.
The way: `sources` and `hub` read, `documents` gives documents, `conversations` and `tokenizer` encode them,
`prepare` splits, packs and caches; `mixture` and `stream` do the same while training.
"""
