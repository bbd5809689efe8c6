"""How good a method is: episodic accuracy with intervals, paired comparison, the joint base and novel space."""
