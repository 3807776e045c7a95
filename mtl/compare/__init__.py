"""Several runs of one experiment side by side: arms of settings with seeds, and replicas that
differ in the order of rows only."""
