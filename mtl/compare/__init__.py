"""Arms of settings over one experiment, several seeds each: run, and compared."""
