"""Benchmarks of epcomm against other ways of doing the same exchange.

``bash launch/bench.sh --help`` runs them; ``main.py`` is the order of events. Names in the code:
T tokens per rank, H hidden, E experts, K top-k, R ranks, M rows a rank receives, S rows it sends.
"""
