"""Whether a run is healthy: alarms over its figures (read alarms.py first), and a look at its parts before."""
