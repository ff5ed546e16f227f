"""Paths named by a dataset or checkpoint: for safety, files outside its folder are not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath


def check_inside(name: str, where: str, what: str = "dataset") -> None:
    """Raise if a path named by a file of a dataset or checkpoint leads out of its folder.

    Args:
        name: The path, relative to the folder.
        where: The file that names it, for the message.
        what: What the folder holds, for the message.

    Raises:
        ValueError: If the path is absolute or contains "..".
    """
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise _outside(name, where, what)


def check_resolved(names: Iterable[str], folders: Sequence[str | Path], where: str) -> None:
    """Raise if a path that a dataset would open is outside its own folders.

    Links in the folders of a path are followed. A link as the file itself is not; `check_links` covers that.

    Args:
        names: Paths, absolute or relative to the working directory, or URLs such as "https://...".
        folders: Folders in which the files may be.
        where: What names the paths, for the message.

    Raises:
        ValueError: If a path is outside the folders, or is a URL.
    """
    inside = [Path(os.path.realpath(folder)) for folder in folders]
    known: dict[str, bool] = {}
    for name in names:
        parent, file = os.path.split(name)
        if parent not in known:
            real = Path(os.path.realpath(parent))
            known[parent] = "://" not in name and any(real.is_relative_to(folder) for folder in inside)
        if not known[parent] or file == "..":
            raise _outside(name, where)


def check_links(folder: str | Path) -> None:
    """Raise if a dataset folder contains a symbolic link that leads out of it. An archive can hold links to any file.

    Args:
        folder: The dataset folder. It may be a link itself, because the user named it. Links in a folder of the Hub's
            cache may lead to where the cache stores files.

    Raises:
        ValueError: If there is such a link; the message names it and its target.
    """
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            check_link(Path(parent, name), folder)


def check_link(path: Path, folder: str | Path, what: str = "dataset") -> None:
    """Raise if a path is a symbolic link that leads out of a folder, as in `check_links`.

    Args:
        path: A path in the folder.
        folder: The folder.
        what: What the folder holds, for the message.

    Raises:
        ValueError: If it is such a link; the message names it and its target.
    """
    if not path.is_symlink():
        return
    # The Hub's cache stores the files of all snapshots in one folder beside them, and links to it.
    snapshot = next((p for p in (Path(folder), *Path(folder).parents) if p.parent.name == "snapshots"), None)
    inside = os.path.realpath(folder if snapshot is None else snapshot.parent.parent)
    if not Path(real := os.path.realpath(path)).is_relative_to(inside):
        raise ValueError(
            f"{path} is a link to {real}, outside the {what} folder. For safety, it is not read: an archive can hold "
            f"links to any file. If you trust the links, replace them by copies (cp -rL {folder} COPY), or use "
            f"another {what}."
        )


def _outside(name: str, where: str, what: str = "dataset") -> ValueError:
    return ValueError(
        f"{where} names the file {name!r}, which is outside the {what} folder. For safety, files outside the {what} "
        f"folder are not read. Fix the path, or use another {what}."
    )
