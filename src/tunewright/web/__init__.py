"""The dashboard: a process of its own that talks to the public HTTP API and to nothing else."""
