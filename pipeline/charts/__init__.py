"""Every chart once: drawn by matplotlib from plain values, for MLflow as PNG and for the pages as SVG."""
