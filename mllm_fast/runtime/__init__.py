"""Running a model: attention through the kernels, recording, decoding, likelihoods, batches."""
