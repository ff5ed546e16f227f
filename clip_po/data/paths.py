"""Files that a data set names: none is read that lies outside the data set's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def check_inside(name: str, where: str) -> None:
    """Refuse a path that a data set names and that would leave the data set's folder.

    Args:
        name: The path, relative to the folder.
        where: The file that names it, for the message.

    Raises:
        ValueError: It is absolute, or climbs out by "..".
    """
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise _outside(name, where)


def check_resolved(names: Iterable[str], folders: Sequence[str | Path], where: str) -> None:
    """Refuse paths that a data set holds ready to be opened and that lie in none of the folders that are its own.

    Links in the paths are followed, but not where the file itself is one: `check_links` sees those.

    Args:
        names: Paths, absolute or relative to the working directory, or addresses such as "https://...".
        folders: Where its files may lie.
        where: What names them, for the message.

    Raises:
        ValueError: One lies elsewhere.
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
    """Refuse a folder with a symbolic link that leads out of it: an archive can hold links to any file.

    Args:
        folder: Of a data set. It may be a link itself, since its user named it; links of the Hub's cache may lead
            to where the cache keeps files.

    Raises:
        ValueError: The message names the first such link, and where it leads.
    """
    # The Hub's cache keeps the files of all snapshots in one place beside them, and links to it.
    snapshot = next((p for p in (Path(folder), *Path(folder).parents) if p.parent.name == "snapshots"), None)
    inside = Path(os.path.realpath(folder if snapshot is None else snapshot.parent.parent))
    for parent, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = os.path.join(parent, name)
            if os.path.islink(path) and not Path(real := os.path.realpath(path)).is_relative_to(inside):
                raise ValueError(
                    f"{path} is a link to {real}, which lies outside the data set's folder. It is not read: an "
                    f"archive can hold links to any file. Put copies in the place of links (cp -rL {folder} COPY) "
                    "where you trust them, or don't use this data set."
                )


def _outside(name: str, where: str) -> ValueError:
    return ValueError(
        f"{where} names the file {name!r}, which lies outside the data set's folder. It is not read: a data set "
        "has no business there. Mend the path, or don't use this data set."
    )
