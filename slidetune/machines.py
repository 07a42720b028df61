"""Machines by name: the catalog of GPUs, links and hosts, and profiles shipped or measured.

`machine("rtx4090")` puts a `HardwareProfile` together from catalog entries and what users say about their own
machine; `load_profile` reads a whole one. Every figure keeps its kind and source, so that a prediction can
say what it rests on.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from slidetune.errors import BadFile, SlidetuneError, UnknownName
from slidetune.hardware import Figure, Gpu, HardwareProfile, Host, Link, Nvme
from slidetune.units import GB

CATALOG = Path(__file__).parent / "catalog"
DEFAULT_GPU = "rtx4090"
DEFAULT_HOST = "workstation"
COMMAND_LINE = "command line"
KERNELS = ("eager", "liger")

_SEE_GPUS = "See `slidetune gpus`."
_LINK_EXAMPLES = "Examples: pcie4x16, gen5x8, 25.5 (GB/s achieved), 25.5/26.4 (up/down)."
_NVME_EXAMPLES = "Example: 2TB:7/5 for 2 TB, reading 7 and writing 5 GB/s; or none."
_SIZE_UNITS = {"gb": 1.0, "tb": 1e3, "gib": 2**30 / GB, "tib": 2**40 / GB}
_NUMBER = r"\d+(?:\.\d+)?"

# Where `slidetune profile` writes unless told otherwise.
PROFILE_HERE = Path("profile.yaml")

# Figures that may be zero in a profile; any other zero would divide.
_MAY_BE_ZERO = {
    "gpu.launch_us",
    "gpu.context_gib",
    "gpu.gap_uploads_us",
    "gpu.gap_downloads_us",
    "link.latency_us",
    "host.upload_dram_weight",
    "host.download_dram_weight",
    "host.process_gib",
    "host.adam_serial_share",
    "host.adam_call_us",
}


# --- GPUs


def gpu_names() -> list[str]:
    """Catalog keys of all GPUs, such as "rtx4090"."""
    return list(_catalog("gpus")["gpus"])


def load_gpu(name: str) -> Gpu:
    """A GPU of the catalog. Case, spaces, dashes and makers' names don't matter, and what is unambiguous may
    be left out: "RTX 4090", "4090", "NVIDIA A100 80GB".

    Raises `UnknownName`, suggesting near names, also where a name fits several cards.
    """
    return _gpu(gpu_key(name))


def gpu_key(name: str) -> str:
    """The catalog key that `name` means. Raises `UnknownName`."""
    keys = gpu_names()
    folded = _fold(name)
    exact = [key for key in keys if folded == _fold(key)]
    found = exact or [key for key in keys if folded in _short_forms(key)]
    if len(found) != 1:
        raise UnknownName("GPU", name, found or keys, _SEE_GPUS)
    return found[0]


def default_link(gpu_name: str) -> Link:
    """The link of a GPU's own generation and width, as a current host gives it. Raises `UnknownName`."""
    key = gpu_key(gpu_name)
    return _link(_catalog("gpus")["gpus"][key]["link"], key)


@cache
def _gpu(key: str) -> Gpu:
    catalog = _catalog("gpus")
    entry, sources = catalog["gpus"][key], catalog["sources"]
    fields = {f.name for f in dataclasses.fields(Gpu)} - {"name", "kernels", "times"} & entry.keys()
    figures = {field: _figure(entry[field], sources, entry["sheet"]) for field in fields}
    return Gpu(name=entry["name"], **figures)


def _fold(name: str) -> str:
    folded = re.sub(r"[\s_-]|nvidia|amd|geforce|radeon|instinct|\bgpu\b", "", name.casefold())
    return re.sub(r"(\d)gb$", r"\1g", folded)


def _short_forms(key: str) -> set[str]:
    """What else a key answers to: without "rtx" or "rx", and without its memory size or variant."""
    base = key.split("-")[0]
    return {re.sub(r"^rt?x", "", _fold(form)) for form in (key, base)} | {_fold(base)}


# What the name of a device may add to the card's own; anything else (Laptop, D, Max-Q, NVL) is another card.
_DECORATION = re.compile(r"(?:\d+gb?|hbm\d?e?|sxm\d?|pcie|generation|blackwell|(?:workstation|server)edition)*")
# How far the memory that a device reports may be from the catalog's, as a fraction: 8 GB aren't 12 GB.
_SAME_MEMORY = 0.06


def catalog_card(device: str, memory_gib: float) -> str | None:
    """The catalog key of the card that a driver names `device` and that has `memory_gib`, or None."""
    folded = _fold(device)

    def fits(key: str) -> bool:
        base, _, variant = key.partition("-")
        rest = folded.removeprefix(_fold(base))
        return (
            folded.startswith(_fold(base))
            and _DECORATION.fullmatch(rest) is not None
            and (variant not in ("pcie", "sxm") or ("pcie" in rest) == (variant == "pcie"))
            and math.isclose(memory_gib, _gpu(key).memory_gib.value, rel_tol=_SAME_MEMORY)
        )

    return next((key for key in gpu_names() if fits(key)), None)


# --- Links


def parse_link(text: str, gpu_name: str = "") -> Link:
    """A link as people write it: "pcie4x16", "gen5x8", "PCIe 4.0 x16", "3.0x16", "nvlink-c2c", or the rates
    in GB/s that were measured, "25.5" or "25.5/26.4" (up/down).

    A rate read on the very GPU named by `gpu_name` stays "measured"; otherwise it is "derived". Raises
    `SlidetuneError`.
    """
    folded = re.sub(r"[\s_]|(?<=\w)-", "", text.casefold())  # a leading minus stays, to be refused
    if match := re.fullmatch(rf"({_NUMBER})(?:/({_NUMBER}))?(?:gb/?s)?", folded):
        up, down = float(match[1]), float(match[2] or match[1])
        if min(up, down) > 0:
            return _given_link(up, down)
    if match := re.fullmatch(r"(?:pcie?)?(?:gen)?(\d)(?:\.0)?x(\d+)", folded):
        generation, lanes = int(match[1]), int(match[2])
        if generation in _catalog("links")["lane_gbs"] and lanes in (1, 2, 4, 8, 16):
            return _link(f"PCIe {generation}.0 x{lanes}", gpu_key(gpu_name) if gpu_name else "")
    if folded in ("nvlinkc2c", "c2c"):
        return _link("NVLink-C2C")
    raise SlidetuneError(f"--link {text!r} is neither a PCIe generation (3 to 5) and width, nor GB/s.", _LINK_EXAMPLES)


def _link(name: str, gpu: str = "") -> Link:
    """A link by its full name; derived from a measured one where the catalog doesn't list it."""
    catalog = _catalog("links")
    if name not in catalog["links"]:
        return _derived_link(name)
    entry = catalog["links"][name]
    figures = {key: _figure(entry[key]) for key in ("h2d_gbs", "d2h_gbs")}
    total = figures["h2d_gbs"].value + figures["d2h_gbs"].value
    figures["duplex_gbs"] = _figure(entry["duplex_gbs"]) if "duplex_gbs" in entry else _duplex(total)
    figures["latency_us"] = _figure(entry.get("latency_us", catalog["latency_us"]))
    if gpu != entry.get("measured_on"):
        # Read on one machine, it is an inference about any other.
        figures = {key: _carried_over(figure) for key, figure in figures.items()}
    return Link(name=name, **figures)


def _derived_link(name: str) -> Link:
    lane_gbs = _catalog("links")["lane_gbs"]
    generation, lanes = (int(digits) for digits in re.fullmatch(r"PCIe (\d)\.0 x(\d+)", name).groups())
    near = max(generation, 4)  # nothing older than generation 4 was measured
    base = _link(f"PCIe {near}.0 x16")
    factor = lanes / 16 * lane_gbs[generation] / lane_gbs[near]

    def scaled(figure: Figure) -> Figure:
        value = round(figure.value * factor, 3)
        return Figure(value, "derived", f"{base.name} ({figure.source}), by the ratio of lanes and lane rates")

    rates = {key: scaled(getattr(base, key)) for key in ("h2d_gbs", "d2h_gbs", "duplex_gbs")}
    return Link(name=name, latency_us=base.latency_us, **rates)


def _given_link(up: float, down: float) -> Link:
    return Link(
        name=f"{up:g}/{down:g} GB/s",
        h2d_gbs=_given(up),
        d2h_gbs=_given(down),
        duplex_gbs=_duplex(up + down),
        latency_us=_figure(_catalog("links")["latency_us"]),
    )


def _duplex(total: float) -> Figure:
    share = _figure(_catalog("links")["duplex_share"])
    return Figure(round(total * share.value, 3), share.kind, share.source)


def _carried_over(figure: Figure) -> Figure:
    return dataclasses.replace(figure, kind="derived") if figure.kind == "measured" else figure


# --- Hosts and drives


def host_names() -> list[str]:
    """Names of the host presets."""
    return list(_catalog("hosts")["hosts"])


def load_host(name: str) -> Host:
    """A host preset, its sizes taken as given. Raises `UnknownName`."""
    catalog = _catalog("hosts")
    entry = _host_entry(name)
    fields = {f.name for f in dataclasses.fields(Host)} - {"name"} & entry.keys()
    return Host(name=name.casefold(), **{field: _figure(entry[field], catalog["sources"]) for field in fields})


def preset_nvme(host_name: str) -> Nvme | None:
    """The drive that a host preset has, or None. Raises `UnknownName`."""
    entry = _host_entry(host_name).get("nvme")
    sources = _catalog("hosts")["sources"]
    return entry and Nvme(**{key: _figure(raw, sources) for key, raw in entry.items()})


def parse_nvme(text: str) -> Nvme | None:
    """A drive as SIZE:READ/WRITE, such as "2TB:7/5": the space that may be used (GB, TB, GiB, TiB) and GB/s.

    "none" is no drive. Raises `SlidetuneError`.
    """
    folded = re.sub(r"\s", "", text.casefold())
    if folded == "none":
        return None
    match = re.fullmatch(rf"({_NUMBER})([tg]i?b):({_NUMBER})/({_NUMBER})(?:gb/s)?", folded)
    if match is None:
        raise SlidetuneError(f"--nvme {text!r} is not SIZE:READ/WRITE.", _NVME_EXAMPLES)
    size, read, write = float(match[1]) * _SIZE_UNITS[match[2]], float(match[3]), float(match[4])
    if min(size, read, write) <= 0:
        raise SlidetuneError(f"--nvme {text!r}: size and rates must be above zero.", _NVME_EXAMPLES)
    return Nvme(size_gb=_given(size), read_gbs=_given(read), write_gbs=_given(write))


def _host_entry(name: str) -> dict[str, Any]:
    hosts = _catalog("hosts")["hosts"]
    if name.casefold() not in hosts:
        raise UnknownName("host preset", name, hosts)
    return hosts[name.casefold()]


# --- Whole machines


def machine(
    gpu: str = DEFAULT_GPU,
    host: str = DEFAULT_HOST,
    *,
    ram_gib: float | None = None,
    cores: float | None = None,
    dram_gbs: float | None = None,
    link: str | Link | None = None,
    nvme: str | Nvme | None = "preset",
    gpu_memory_gib: float | None = None,
    kernels: str | None = None,
) -> HardwareProfile:
    """A machine from catalog entries and what is known better.

    `gpu` and `host` name catalog entries; the link is the GPU's own unless given. The rest as for `adapted`.
    """
    key = gpu_key(gpu)
    the_host = load_host(host)
    base = HardwareProfile(
        name=f"{key}-{the_host.name}",
        gpu=_gpu(key),
        link=link if isinstance(link, Link) else default_link(key),
        host=the_host,
        nvme=preset_nvme(host),
    )
    return adapted(
        base,
        ram_gib=ram_gib,
        cores=cores,
        dram_gbs=dram_gbs,
        link=link,
        nvme=None if nvme == "preset" else nvme or "none",
        gpu_memory_gib=gpu_memory_gib,
        kernels=kernels,
    )


def adapted(
    profile: HardwareProfile,
    *,
    ram_gib: float | None = None,
    cores: float | None = None,
    dram_gbs: float | None = None,
    link: str | Link | None = None,
    nvme: str | Nvme | None = None,
    gpu_memory_gib: float | None = None,
    kernels: str | None = None,
) -> HardwareProfile:
    """The same machine with what is known better; None leaves things as they are.

    `ram_gib` GiB of RAM; `cores` physical cores; `dram_gbs` peak DRAM bandwidth of all channels, GB/s; `link`
    as for `parse_link`; `nvme` as for `parse_nvme`; `gpu_memory_gib` caps what may be used of the GPU, context
    included; `kernels` "eager" (transformers' own) or "liger". Raises `SlidetuneError`, naming the flag, for
    figures no machine has.
    """
    given = {"ram_gib": ("--ram", ram_gib), "cores": ("--cores", cores), "dram_gbs": ("--dram-bw", dram_gbs)}
    if cores is not None and cores < 1:
        raise SlidetuneError(f"--cores {cores:g}: must be at least 1.")
    changes = {field: _given(_positive(flag, value)) for field, (flag, value) in given.items() if value is not None}
    host = dataclasses.replace(profile.host, **changes)
    if host.usable_bytes <= 0:
        raise SlidetuneError(
            f"--ram {host.ram_gib.value:g} GiB leaves no RAM to use.",
            f"The process and the operating system alone take {host.process_gib.value:g} GiB.",
        )
    gpu = profile.gpu if gpu_memory_gib is None else capped(profile.gpu, gpu_memory_gib)
    if kernels is not None:
        if kernels not in KERNELS:
            raise UnknownName("kernels", kernels, KERNELS)
        gpu = dataclasses.replace(gpu, kernels=kernels)
    # A link read on this very GPU stays "measured".
    key = next((key for key in gpu_names() if _gpu(key).name == profile.gpu.name), "")
    return dataclasses.replace(
        profile,
        gpu=gpu,
        host=host,
        link=parse_link(link, key) if isinstance(link, str) else link or profile.link,
        nvme=parse_nvme(nvme) if isinstance(nvme, str) else nvme or profile.nvme,
    )


def with_gpu(profile: HardwareProfile, name: str) -> HardwareProfile:
    """The machine with a card of the catalog, and that card's own link, in place of its own.

    A card that it has already stays as it is, since its profile knows more than the catalog.
    """
    key = gpu_key(name)
    card = _gpu(key)
    if card.name == profile.gpu.name:
        return profile
    gpu = dataclasses.replace(card, kernels=profile.gpu.kernels)
    return dataclasses.replace(profile, name=f"{profile.name}-{key}", gpu=gpu, link=default_link(key))


def capped(gpu: Gpu, cap_gib: float) -> Gpu:
    """The GPU with only `cap_gib` of its memory to use. Raises `SlidetuneError` for more than it has."""
    size = gpu.memory_gib.value
    if not 1 <= cap_gib <= size:
        raise SlidetuneError(
            f"--gpu-memory {cap_gib:g} GiB is not between 1 GiB and the {size:g} GiB of the {gpu.name}.",
            "It caps what may be used of the card.",
        )
    return dataclasses.replace(gpu, memory_gib=_given(cap_gib))


def memory_cap_gib(profile: HardwareProfile) -> float | None:
    """The cap on GPU memory that the user set, if any."""
    memory = profile.gpu.memory_gib
    return memory.value if memory.source == COMMAND_LINE else None


def _positive(flag: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise SlidetuneError(f"{flag} {value:g}: must be above zero.")
    return value


# --- Profiles


def profile_names() -> list[str]:
    """Names of the profiles that ship with the catalog."""
    return sorted(path.stem for path in (CATALOG / "profiles").glob("*.yaml"))


def load_profile(ref: str | Path) -> HardwareProfile:
    """A whole machine: a shipped profile's name, or the path of a YAML file.

    Raises `UnknownName` for a name that is neither, `BadFile` for a file that isn't a profile or whose
    figures no machine has.
    """
    from slidetune import files

    path = CATALOG / "profiles" / f"{ref}.yaml" if str(ref) in profile_names() else Path(ref).expanduser()
    looks_like_path = path.exists() or path.suffix or len(path.parts) > 1
    if not looks_like_path:
        raise UnknownName("profile", str(ref), profile_names(), "Or give the path of a YAML file.")
    profile = files.read(path, HardwareProfile)
    _check_figures(path, profile)
    return profile


def guessed(profile: HardwareProfile) -> list[str]:
    """The figures of a profile that are guesses, one readable line each."""
    return [
        f"{path} = {figure.value:g}: {figure.source or 'no source'}"
        for path, figure in profile.figures()
        if figure.kind == "guess"
    ]


# Each with the share of it that is reached: what is measured is the product.
_ACHIEVED = {"gpu.bf16_tflops": "gpu.matmul_efficiency", "gpu.memory_gbs": "gpu.memory_efficiency"}
# A preset's sizes and parts, which are nobody's guess of this machine.
_PRESETS = {"host.cores", "host.ram_gib", "host.dram_gbs", "host.dram_efficiency"}


@dataclasses.dataclass(frozen=True, slots=True)
class Guess:
    """What the catalog has for a figure that was measured."""

    figure: Figure
    """The catalog's. A rate is what is reached of it, as measured rates are."""
    difference: float
    """How far the measured figure is from it, as a fraction of it."""


def catalog_guesses(profile: HardwareProfile) -> dict[str, Guess]:
    """By path, what `machine` assumes of the figures of a measured profile; nothing for a card it doesn't have."""
    key = catalog_card(profile.gpu.name, profile.gpu.memory_gib.value)
    if key is None:
        return {}
    assumed = machine(key)
    found = {}
    for path, figure in profile.figures():
        if figure.kind != "measured" or path in _PRESETS or path in _ACHIEVED.values() or path.startswith("nvme."):
            continue
        guess, value = assumed.figure(path), figure.value
        if efficiency := _ACHIEVED.get(path):
            share = assumed.figure(efficiency)
            guess = dataclasses.replace(share, value=round(guess.value * share.value, 6))
            value *= profile.figure(efficiency).value
        if guess.value > 0:
            found[path] = Guess(guess, round(value / guess.value - 1.0, 4))
    return found


def _check_figures(path: Path, profile: HardwareProfile) -> None:
    for name, figure in profile.figures():
        if figure.value < 0 or (figure.value == 0 and name not in _MAY_BE_ZERO):
            raise BadFile(f"{path}: {name} is {figure.value:g}; it must be above zero.")
        if figure.measured_spread is not None and figure.measured_spread < 0:
            raise BadFile(f"{path}: {name} has a measured_spread of {figure.measured_spread:g}; it can't be negative.")
    for part, inner, outer in (("gpu", "context_gib", "memory_gib"), ("host", "process_gib", "ram_gib")):
        if profile.figure(f"{part}.{inner}").value >= profile.figure(f"{part}.{outer}").value:
            raise BadFile(f"{path}: {part}.{inner} leaves nothing of {part}.{outer} to use.")


# --- Catalog files


def _given(value: float) -> Figure:
    return Figure(value, "given", COMMAND_LINE)


def _figure(raw: Any, sources: dict[str, str] | None = None, sheet: str = "") -> Figure:
    """[value, kind, source], or a bare data-sheet number; a source may be a key of `sources`."""
    value, kind, source = raw if isinstance(raw, list) else (raw, "data sheet", sheet)
    return Figure(float(value), kind, (sources or {}).get(source, source))


@cache
def _catalog(name: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster, but optional
    with open(CATALOG / f"{name}.yaml", encoding="utf-8") as file:
        return yaml.load(file, loader)
