"""A run before there is a cluster: `pretrain_metro.py --dry_run`.

One step is traced for each class of ranks (tracing.py), their calls of the communication library are laid side by side
for all ranks (ranks.py, matching.py), and the step is played in time (timeline.py).
"""
