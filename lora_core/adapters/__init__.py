"""LoRA, DoRA and full updates of Linear and Conv2d layers.

injection.py       put adapters on a model and take them off; strengths and factors
folded_weights.py  fold adapters into the base weights, in place or into a state dict
kinds.py           the kinds of adapter, and how to write one
adapted_layer.py   the module that replaces a layer, and the choice of its forward
groups.py          layers that share an input, computed by one kernel
targets.py         globs over the paths of layers
weight_updates.py  an adapter's tensors as a record, and delta W
patch.py           put a LoRA file on networks in memory in one call
custom_files.py    files of adapters without a low-rank form
"""
