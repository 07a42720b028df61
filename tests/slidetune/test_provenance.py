"""Where and with what something was measured."""

import pytest

from slidetune import provenance


def test_this_machine():
    found = provenance.machine("cpu")
    assert found.keys() == {"cpu", "cores", "ram"}
    assert int(found["cores"]) >= 1


def test_versions_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGES", ("slidetune", "no-such-package"))
    assert provenance.versions().keys() == {"python", "slidetune"}


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 22:50:36 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)",
    ],
)
def test_the_driver(tmp_path, monkeypatch, line):
    file = tmp_path / "version"
    monkeypatch.setattr(provenance, "_DRIVER", file)
    assert provenance._driver() == "unknown"
    file.write_text(f"{line}\nGCC version:  gcc version 13.3.0\n")
    assert provenance._driver() == "570.86.15"
