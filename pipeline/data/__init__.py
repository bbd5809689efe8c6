"""Images to Arrow shards, shards to episodes, episodes to each worker's tensors. Knows no method."""
