"""Finished models side by side: their losses by task, the best of a run, and studies of several
runs (arms of settings with seeds, and replicas that differ in the order of rows only)."""
