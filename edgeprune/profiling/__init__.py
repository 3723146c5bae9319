"""Which kernels to measure, and the measuring run."""
