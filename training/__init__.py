"""Training runs: setup, steps, logs, checkpoints, results. train.py is the loop.

inputs/       images, captions, latents and noise of a step, and their caches
networks/     frozen weights: quantized, streamed, off the device, divided among processes
memory/       --plan, the sentence for a run without memory, the peak
checks/       what is checked before data and model are read, and with them
probes/       whether each option had an effect
comparisons/  --compare: finished runs side by side
"""
