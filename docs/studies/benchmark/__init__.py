"""How fast the pipeline is on this machine or cluster: ratios of sides that are measured in turn, within one run."""
