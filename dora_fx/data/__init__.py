"""Training data: records of files, what each says by its format, its tokens with those that are learned, sequences."""
