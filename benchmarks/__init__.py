"""Side-by-side measurements, each rival in its own process. benchmarks/README.md says how to run them."""
