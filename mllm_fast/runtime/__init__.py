"""Running a model: attention through the kernels, recording, decoding, answer probabilities and batches."""
