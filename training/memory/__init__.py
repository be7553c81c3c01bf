"""The memory of a run on its device: the plan before it, the peak, advice where it lacks."""
