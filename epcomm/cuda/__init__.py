"""The CUDA back end: dispatch and combine among ranks that map each other's device memory."""
