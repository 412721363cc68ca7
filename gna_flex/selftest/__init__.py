"""Whether a route computes the right thing on this machine: problems in a process of their own, and the verdict."""
