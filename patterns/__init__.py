"""What counts as an attention region: one family a file."""
