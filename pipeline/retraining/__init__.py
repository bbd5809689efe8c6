"""Retraining on a schedule: ingest what is new, train a challenger, promote it or keep the champion."""
