"""What a file is by its first bytes, for the errors of readers that it is not for."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_file", "look_of"]

_BEGINNINGS = {
    b"\x89HDF": "HDF5", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file, cut off or of something else", b"NRRD": "NRRD", b"ObjectType": "MetaImage",
    b"#Insight": "an ITK transform in text",
    b"MATLAB": "a MATLAB file",
    b"(Transform ": "elastix's parameters, of which transformix -def all makes a field that is read",
}  # fmt: skip


def check_file(path: str | Path) -> None:
    """FileNotFoundError for what is not there, ValueError for a folder."""
    if Path(path).is_dir():
        raise ValueError(f"{path} must be a file, got a folder; of a folder of DICOM files dcm2niix makes a NIfTI file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")


def look_of(path: str | Path) -> str:
    """What a file looks like, as "an empty file" or "1000 bytes that begin with b'…'"."""
    with Path(path).open("rb") as file:
        start = file.read(132)
    if not start:
        return "an empty file"
    if start[128:] == b"DICM":
        return "DICOM, of which dcm2niix makes a NIfTI file"
    if start[:1] in (b"{", b"[") and start.isascii() and start.decode().isprintable():
        return "JSON"
    known = next((name for begins, name in _BEGINNINGS.items() if start.startswith(begins)), "")
    return known or f"{Path(path).stat().st_size} bytes that begin with {start[:12]!r}"
