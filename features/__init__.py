"""Frozen encoders, and their embeddings on disk."""
