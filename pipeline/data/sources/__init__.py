"""Where images come from: one file a source. A registered model carries those that read and decode files."""
