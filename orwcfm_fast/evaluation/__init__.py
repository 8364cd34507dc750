"""Measures samples: reward, W2, diversity, fidelity, each with its interval."""
