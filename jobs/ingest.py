"""Images to a dataset of shards: ``python -m jobs.ingest data=NAME [key=value ...]``."""

from __future__ import annotations

import time
from typing import Any

from jobs._main import run
from pipeline.config import Config
from pipeline.data.ingest import SKIPPED_NAME, ingest


def main(config: Config) -> dict[str, Any]:
    start = time.perf_counter()
    manifest = ingest(config, progress=True)
    uri = f"{config['data']['root'].rstrip('/')}/{config['data']['name']}"
    splits = {split: len(members) * len(manifest.rotations) for split, members in manifest.splits.items()}
    seconds = time.perf_counter() - start
    print(f"{uri}: {manifest.rows:,} images of {len(manifest.class_names):,} classes, {seconds:.1f} s")
    print("  classes to draw from: " + ", ".join(f"{count:,} {split}" for split, count in splits.items()))
    if manifest.skipped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
        print(f"  left out: {counts}; listed in {uri}/{SKIPPED_NAME}")
    print(f"  fingerprint {manifest.fingerprint}")
    return {
        "uri": uri,
        "fingerprint": manifest.fingerprint,
        "images": manifest.rows,
        "splits": splits,
        "skipped": manifest.skipped,
        "seconds": seconds,
    }


if __name__ == "__main__":
    run("ingest", main)
