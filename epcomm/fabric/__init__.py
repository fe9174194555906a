"""Bytes between nodes through triggers, proxy threads and a transport."""
