"""Preparation: many-language raw text to packed, checksummed WebDataset shards."""
