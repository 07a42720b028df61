"""`slidetune profile`: what it refuses; tests/runtime has its measurements."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from .commands import refused


def test_a_device_that_is_not_here(tmp_path):
    for device in ("cuda:99", "foo"):
        refused(
            "profile", "--quick", "--device", device, cwd=tmp_path, saying=rf"device {device} is not here\. There is"
        )


def test_a_drive_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    options = ("profile", "--quick", "--device", "cpu")
    refused(*options, "--nvme-dir", "nowhere", cwd=tmp_path, saying=r"No such file .*--nvme-dir")
    refused(*options, "--nvme-dir", "file", cwd=tmp_path, saying=r"Not a directory .*--nvme-dir")
    assert not (tmp_path / "profile.yaml").exists()
