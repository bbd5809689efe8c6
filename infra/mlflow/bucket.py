"""Copies of the database into the bucket and back.

python bucket.py put FOLDER s3://BUCKET/PREFIX: every file of the folder.
python bucket.py get s3://BUCKET/PREFIX FOLDER NAME ...: these files, into the folder.
"""

import sys
from pathlib import Path

import boto3


def place(uri: str, name: str) -> dict[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix.rstrip('/')}/{name}"}


def put(folder: str, uri: str) -> None:
    files = sorted(Path(folder).iterdir())
    if not files:
        sys.exit(f"error: {folder} is empty")
    for file in files:
        boto3.client("s3").upload_file(str(file), **place(uri, file.name))
        print(f"{uri}/{file.name}: {file.stat().st_size} bytes")


def get(uri: str, folder: str, *names: str) -> None:
    for name in names:
        boto3.client("s3").download_file(Filename=str(Path(folder, name)), **place(uri, name))


if __name__ == "__main__":
    {"put": put, "get": get}[sys.argv[1]](*sys.argv[2:])
