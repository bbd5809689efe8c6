"""The mathematics: pure functions over tensors, batched over tasks."""
