"""What runs in a Ray Train worker, and what launches it. Knows no registry."""
