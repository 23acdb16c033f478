"""Where the replaced tokens come from: read corruptor.py first."""
