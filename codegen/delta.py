"""The delta rule in chunks: placeholder."""
