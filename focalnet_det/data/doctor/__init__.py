"""Diagnose datasets: report errors with remedies, and repair what is safe."""
