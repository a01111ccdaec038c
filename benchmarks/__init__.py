"""Side-by-side benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks.dropout`` one."""
