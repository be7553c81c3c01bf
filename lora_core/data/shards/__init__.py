"""Training sets in tar, parquet and Arrow files, read where they are."""
