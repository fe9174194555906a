"""The benchmark of the CUDA back end inside a node; ``benchmarks.gpu_inside`` runs it.

A *setting* is a number of ranks and of SMs for each of them, written 8x16.
"""
