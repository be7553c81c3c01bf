"""Probes in a run's first step and at its end: whether each option had an effect."""
