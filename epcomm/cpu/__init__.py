"""The CPU back end: shared memory inside a node, messages between nodes, Numba kernels."""
