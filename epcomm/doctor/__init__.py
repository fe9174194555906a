"""What this machine offers to epcomm, and whether it works: ``python -m epcomm.doctor``."""
