"""Read image folders and hub datasets as batches of pixels, captions and masks."""
