"""Read image folders, shards and hub datasets as batches of pixels, captions and masks.

listing.py      the files of a folder;  records.py: each image with its captions and its mask
captions.py     captions of files, names and templates
dataset.py      the images of a step, decoded, cropped, flipped
sample_order.py the order of the images, by (seed, step);  step_visits.py: the same before a read
shards/         images in tar, parquet and Arrow files, read where they are
cache.py        tensors on the disk, shared by processes
"""
