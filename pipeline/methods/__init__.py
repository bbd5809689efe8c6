"""The few-shot methods, one file each. ``pipeline.methods.base`` has the contract."""
