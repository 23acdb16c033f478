"""What a run costs, from its configuration alone: no model is built and no library but the configuration's is loaded.

parameters.py, flops.py and memory.py count, gpus.py says what devices can do, layouts.py puts these together into the
time of a step and finds the best layout. Benchmarks and the trainer take their numbers here.
"""
