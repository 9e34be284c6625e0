"""Benchmark speed and memory against other libraries; never imported by the library itself."""
