"""Set metrics; one file is one metric."""
