"""Benchmarks of the library's operations."""
