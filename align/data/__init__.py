"""Rows to token ids: formats, tokenization, packing, loading."""
