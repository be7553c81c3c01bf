"""Memory: tensors counted while they live, weights in few bits, blocks in host memory, errors."""
