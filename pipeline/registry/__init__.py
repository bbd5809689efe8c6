"""Runs and models in MLflow: tracking, publishing, packaging, versions."""
