"""The hardware catalog against numbers typed in independently, and everything that people may type."""

import dataclasses
import math
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slidetune import files, machines
from slidetune.errors import BadFile, SlidetuneError, UnknownName
from slidetune.hardware import Figure, Gpu, HardwareProfile, Host, Kind, Link, Nvme
from slidetune.machines import (
    catalog_card,
    catalog_guesses,
    default_link,
    gpu_names,
    guessed,
    host_names,
    load_gpu,
    load_host,
    load_profile,
    machine,
    parse_link,
    parse_nvme,
    preset_nvme,
    profile_names,
    with_gpu,
)

# Dense bf16 TFLOP/s with fp32 accumulation, GiB as sold, GB/s, link. From data sheets, not from the catalog.
DATA_SHEETS = {
    "rtx3060-12g": (25.5, 12, 360, "PCIe 4.0 x16"),
    "rtx3090": (71, 24, 936, "PCIe 4.0 x16"),
    "rtx4060ti-16g": (44, 16, 288, "PCIe 4.0 x8"),
    "rtx4070tisuper": (88, 16, 672, "PCIe 4.0 x16"),
    "rtx4080": (97.5, 16, 717, "PCIe 4.0 x16"),
    "rtx4090": (165.2, 24, 1008, "PCIe 4.0 x16"),
    "rtx5060ti-16g": (47.4, 16, 448, "PCIe 5.0 x8"),
    "rtx5080": (112.6, 16, 960, "PCIe 5.0 x16"),
    "rtx5090": (209.5, 32, 1792, "PCIe 5.0 x16"),
    "rtxa6000": (154.8, 48, 768, "PCIe 4.0 x16"),
    "rtx6000ada": (364.25, 48, 960, "PCIe 4.0 x16"),
    "rtxpro6000-blackwell": (503.8, 96, 1792, "PCIe 5.0 x16"),
    "l4": (121, 24, 300, "PCIe 4.0 x16"),
    "l40s": (362.05, 48, 864, "PCIe 4.0 x16"),
    "a10g": (70, 24, 600, "PCIe 4.0 x16"),
    "a100-40g": (312, 40, 1555, "PCIe 4.0 x16"),
    "a100-80g": (312, 80, 2039, "PCIe 4.0 x16"),
    "h100-pcie": (756, 80, 2000, "PCIe 5.0 x16"),
    "h100-sxm": (989, 80, 3350, "PCIe 5.0 x16"),
    "h200": (989, 141, 4800, "PCIe 5.0 x16"),
    "b200": (2250, 180, 7700, "PCIe 5.0 x16"),
    "gh200": (989, 96, 4000, "NVLink-C2C"),
    "mi300x": (1307, 192, 5300, "PCIe 5.0 x16"),
    "rx7900xtx": (122.8, 24, 960, "PCIe 4.0 x16"),
}


def figures_of(part):
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return {name: value for name, value in values.items() if hasattr(value, "kind")}


# --- the catalog itself


def test_every_gpu_is_checked_against_a_data_sheet():
    assert set(DATA_SHEETS) <= set(gpu_names())


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_data_sheet_figures(name):
    tflops, memory, bandwidth, link = DATA_SHEETS[name]
    gpu = load_gpu(name)
    assert gpu.bf16_tflops.value == pytest.approx(tflops, rel=0.005)
    assert gpu.memory_gbs.value == pytest.approx(bandwidth, rel=0.005)
    # ECC and firmware may take up to 7 % of what the box says; nothing ever adds memory.
    assert 0.93 * memory <= gpu.memory_gib.value <= memory
    assert default_link(name).name == link


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_every_gpu_figure_says_how_it_is_known(name):
    gpu = load_gpu(name)
    assert {"bf16_tflops", "memory_gib", "memory_gbs"} <= figures_of(gpu).keys()
    named = {f"gpu.{field}": figure for field, figure in figures_of(gpu).items()}
    for path, figure in [*named.items(), *figures_of(default_link(name)).items()]:
        assert figure.kind in typing.get_args(Kind)
        assert len(figure.source) > 8
        assert figure.value > 0 or path in machines._MAY_BE_ZERO
        assert math.isfinite(figure.value)
    assert gpu.bf16_tflops.kind == "data sheet"


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_efficiencies_are_plausible(name):
    gpu = load_gpu(name)
    # GeForce boards run above the boost clock they are sold with; no memory is faster than its bus.
    assert 0.3 < gpu.matmul_efficiency.value < 1.15
    assert 0.7 < gpu.memory_efficiency.value < 1
    assert gpu.usable_bytes > 0.9 * gpu.memory_gib.value * 2**30


def test_a_source_is_never_an_unresolved_key():
    keys = {key for name in ("gpus", "hosts") for key in machines._catalog(name)["sources"]}
    sources = {f.source for name in gpu_names() for f in figures_of(load_gpu(name)).values()}
    sources |= {f.source for name in host_names() for f in figures_of(load_host(name)).values()}
    assert not keys & sources


def test_every_catalog_source_is_used():
    for name in ("gpus", "hosts"):
        catalog = machines._catalog(name)
        body = yaml.safe_dump({key: value for key, value in catalog.items() if key != "sources"})
        assert [key for key in catalog["sources"] if key not in body] == []


def test_measured_anchors():
    assert load_gpu("h200").matmul_flops == pytest.approx(670e12, rel=0.002)
    assert load_gpu("h200").matmul_efficiency.kind == "measured"
    # About 172 TFLOP/s in products leaves 155 over a whole step of SlideFormer's largest batch.
    assert 160e12 < load_gpu("rtx4090").matmul_flops < 180e12


# --- names


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("RTX 4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("rtx_3060", "rtx3060-12g"),
        ("4060 Ti 16GB", "rtx4060ti-16g"),
        ("RTX A6000", "rtxa6000"),
        ("RTX 6000 Ada", "rtx6000ada"),
        ("rtx pro 6000", "rtxpro6000-blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell", "rtxpro6000-blackwell"),
        ("A100 80GB", "a100-80g"),
        ("H100 SXM", "h100-sxm"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Radeon RX 7900 XTX", "rx7900xtx"),
        ("7900xtx", "rx7900xtx"),
    ],
)
def test_gpu_names_are_forgiving(text, key):
    assert load_gpu(text) == load_gpu(key)


@given(st.sampled_from(sorted(DATA_SHEETS)), st.data())
def test_case_spaces_and_dashes_never_matter(key, data):
    text = key
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from([" ", "-", "_"])) + text[at:]
    assert load_gpu(text.upper()) == load_gpu(key)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("rtx4091", "rtx4090"),
        ("h100", "h100-sxm"),
        ("h100", "h100-pcie"),
        ("a100", "a100-80g"),
        ("mi300", "mi300x"),
    ],
)
def test_unknown_and_ambiguous_gpus_suggest_near_names(text, suggestion):
    with pytest.raises(UnknownName) as caught:
        load_gpu(text)
    assert suggestion in caught.value.hint
    assert "slidetune gpus" in caught.value.hint


@pytest.mark.parametrize("text", ["4060", "409", "0", "", "rtx", "-", "gpu"])
def test_part_of_a_name_is_no_name(text):
    """A 4060 is not a 4060 Ti: near is not good enough."""
    with pytest.raises(UnknownName):
        load_gpu(text)


# --- links


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pcie4x16", "PCIe 4.0 x16"),
        ("PCIe 4.0 x16", "PCIe 4.0 x16"),
        ("pci-e 4.0 x16", "PCIe 4.0 x16"),
        ("gen5x8", "PCIe 5.0 x8"),
        ("PCIe gen 3 x4", "PCIe 3.0 x4"),
        ("3.0x16", "PCIe 3.0 x16"),
        ("NVLink-C2C", "NVLink-C2C"),
    ],
)
def test_links_as_people_write_them(text, name):
    assert parse_link(text).name == name


def test_every_link_name_reads_back():
    for name in {default_link(gpu).name for gpu in gpu_names()}:
        assert parse_link(name).name == name


@pytest.mark.parametrize("generation", [3, 4, 5])
def test_rates_are_proportional_to_lanes(generation):
    full = parse_link(f"pcie{generation}x16")
    for lanes in (1, 2, 4, 8):
        narrow = parse_link(f"pcie{generation}x{lanes}")
        for field in ("h2d_gbs", "d2h_gbs", "duplex_gbs"):
            ratio = getattr(narrow, field).value / getattr(full, field).value
            assert ratio == pytest.approx(lanes / 16, rel=1e-3)
            assert getattr(narrow, field).kind == "derived"


def test_the_x8_cards_have_half_a_link():
    assert default_link("4060 Ti").h2d_gbs.value == pytest.approx(default_link("4090").h2d_gbs.value / 2, rel=1e-3)
    assert default_link("5060 Ti").h2d_gbs.value == pytest.approx(default_link("5090").h2d_gbs.value / 2, rel=1e-3)


def test_measured_links():
    pcie4, pcie5 = default_link("rtx4090"), default_link("h200")
    assert (pcie4.h2d_gbs.value, pcie4.d2h_gbs.value) == (25.5, 26.4)
    assert (pcie5.h2d_gbs.value, pcie5.d2h_gbs.value, pcie5.duplex_gbs.value) == (55.2, 55.2, 100.2)
    assert pcie4.h2d_gbs.kind == pcie5.h2d_gbs.kind == pcie5.duplex_gbs.kind == "measured"


def test_a_measurement_elsewhere_is_only_derived_here():
    assert default_link("rtx3090").h2d_gbs.kind == "derived"
    assert machine("h200", link="pcie5x16").link == default_link("h200")
    assert machine("rtx5090", link="pcie5x16").link.h2d_gbs.kind == "derived"


def test_no_link_beats_its_wires():
    theory = {3: 0.985, 4: 1.969, 5: 3.938}
    for generation, lane_gbs in theory.items():
        link = parse_link(f"gen{generation}x16")
        best = max(link.h2d_gbs.value, link.d2h_gbs.value)
        assert 0.75 * 16 * lane_gbs < best < 16 * lane_gbs
        assert best < link.duplex_gbs.value < link.h2d_gbs.value + link.d2h_gbs.value


@given(st.floats(0.5, 500), st.floats(0.5, 500))
def test_given_rates(up, down):
    link = parse_link(f"{up:.3f}/{down:.3f}")
    assert link.h2d_gbs.value == pytest.approx(up, abs=6e-4)
    assert link.d2h_gbs.value == pytest.approx(down, abs=6e-4)
    assert link.h2d_gbs.kind == link.d2h_gbs.kind == "given"
    assert link.h2d_gbs.source == "command line"
    assert link.duplex_gbs.value == pytest.approx(0.907 * (up + down), rel=5e-3)


def test_one_rate_is_both():
    assert parse_link("25.5 GB/s").d2h_gbs.value == 25.5


@pytest.mark.parametrize(
    "text", ["", "fast", "-3", "0", "25/0", "0/25", "gen6x16", "gen4x3", "x16", "gen4", "nan", "inf"]
)
def test_bad_links_show_examples(text):
    with pytest.raises(SlidetuneError, match="--link") as caught:
        parse_link(text)
    assert "pcie4x16" in caught.value.hint


# --- hosts and drives


def test_presets():
    assert host_names() == ["desktop", "workstation", "server"]
    sizes = {name: (load_host(name).cores.value, load_host(name).ram_gib.value) for name in host_names()}
    assert sizes == {"desktop": (8, 64), "workstation": (16, 128), "server": (32, 512)}
    bandwidths = [load_host(name).dram_gbs.value for name in host_names()]
    assert bandwidths == [89.6, 89.6, 307.2]
    assert preset_nvme("desktop") is None
    assert preset_nvme("workstation").size_gb.value == 2000
    assert preset_nvme("server").size_gb.value == 4000


@pytest.mark.parametrize("name", ["desktop", "workstation", "server"])
def test_every_host_figure_says_how_it_is_known(name):
    parts = [load_host(name), *([preset_nvme(name)] if preset_nvme(name) else [])]
    for field, figure in (item for part in parts for item in figures_of(part).items()):
        assert figure.kind in typing.get_args(Kind)
        assert figure.source
        assert figure.value > 0 or f"host.{field}" in machines._MAY_BE_ZERO


# --- what a driver calls a card


@pytest.mark.parametrize(
    ("device", "memory_gib", "key"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40g"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA GeForce RTX 3060", 11.8, "rtx3060-12g"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.7, "rtx4070tisuper"),
        ("NVIDIA RTX A6000", 47.5, "rtxa6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.0, "rtxpro6000-blackwell"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA A10G", 22.0, "a10g"),
        ("AMD Instinct MI300X", 192.0, "mi300x"),
        # Other cards of a like name.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
        ("NVIDIA GeForce RTX 3060", 7.8, None),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.7, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA L40", 44.4, None),
        ("CPU as device", 64.0, None),
        ("", 24.0, None),
    ],
)
def test_a_card_by_what_the_driver_calls_it(device, memory_gib, key):
    assert catalog_card(device, memory_gib) == key


@pytest.mark.parametrize("key", gpu_names())
def test_every_card_of_the_catalog_can_be_found(key):
    gpu = load_gpu(key)
    suffix = " PCIe" if key == "h100-pcie" else ""
    assert catalog_card(f"{key.split('-')[0]}{suffix}", gpu.memory_gib.value) == key


def measured(profile):
    """A profile as `slidetune profile` writes it: all measured, efficiencies 1."""
    for path, figure in profile.figures():
        efficiency = f"{path.split('.')[0]}.{'matmul' if 'tflops' in path else 'memory'}_efficiency"
        reached = profile.figure(efficiency).value if path in ("gpu.bf16_tflops", "gpu.memory_gbs") else 1.0
        value = 1.0 if path.endswith("_efficiency") else figure.value * reached
        profile = profile.replaced(path, Figure(value, "measured", "bench", 0.02))
    return profile


def test_a_machine_that_is_as_the_catalog_has_it_differs_nowhere():
    guesses = catalog_guesses(measured(machine("rtx4090")))
    assert {guess.difference for guess in guesses.values()} == {0.0}
    assert guesses["gpu.bf16_tflops"].figure.value == pytest.approx(load_gpu("rtx4090").matmul_flops / 1e12)
    assert {"link.h2d_gbs", "link.latency_us", "host.download_priority", "host.adam_gparams_per_core"} <= set(guesses)
    # Nobody guessed how much RAM there is, or which drive.
    assert not {"host.cores", "host.ram_gib", "host.dram_gbs", "nvme.read_gbs"} & set(guesses)


def test_what_a_measurement_changed_of_the_catalogs_guess():
    here = measured(machine("rtx4090")).scaled("link.h2d_gbs", 0.88).scaled("gpu.bf16_tflops", 1.1)
    guesses = catalog_guesses(here)
    changed = {path: guess.difference for path, guess in guesses.items() if guess.difference}
    assert changed == {"link.h2d_gbs": -0.12, "gpu.bf16_tflops": 0.1}
    assert guesses["link.h2d_gbs"].figure == default_link("rtx4090").h2d_gbs


def test_figures_that_were_not_measured_are_not_compared():
    assert catalog_guesses(machine("rtx4090")).keys() <= {
        path for path, figure in machine("rtx4090").figures() if figure.kind == "measured"
    }


def test_no_guess_of_an_unknown_card():
    here = measured(machine("rtx4090"))
    assert catalog_guesses(dataclasses.replace(here, gpu=dataclasses.replace(here.gpu, name="CPU as device"))) == {}


def test_unknown_preset():
    with pytest.raises(UnknownName, match="workstation"):
        load_host("workstatoin")
    with pytest.raises(UnknownName):
        preset_nvme("laptop")


@pytest.mark.parametrize(
    ("text", "size_gb"),
    [
        ("500GB:3.5/2", 500),
        ("2TB:7/5", 2000),
        ("2 tb: 7/5 GB/s", 2000),
        ("1.8TiB:7/5", 1979.12),
        ("512GiB:7/5", 549.76),
    ],
)
def test_drives(text, size_gb):
    drive = parse_nvme(text)
    assert drive.size_gb.value == pytest.approx(size_gb, rel=1e-4)
    assert drive.usable_bytes == int(drive.size_gb.value * 1e9)
    told = [drive.size_gb, drive.read_gbs, drive.write_gbs]
    assert all(f.kind == "given" and f.source == "command line" for f in told)


@given(st.floats(0.01, 99), st.floats(0.1, 99), st.floats(0.1, 99))
def test_any_drive_reads_back(size, read, write):
    drive = parse_nvme(f"{size:.4f}TB:{read:.4f}/{write:.4f}")
    assert drive.size_gb.value == pytest.approx(1000 * size, abs=0.06)
    assert drive.read_gbs.value == pytest.approx(read, abs=1e-4)
    assert drive.write_gbs.value == pytest.approx(write, abs=1e-4)


def test_no_drive():
    assert parse_nvme("none") is None
    assert parse_nvme(" None ") is None


@pytest.mark.parametrize(
    "text", ["", "2TB", "2TB:7", "7/5", "2:7/5", "2PB:7/5", "-2TB:7/5", "0TB:7/5", "2TB:0/5", "2TB:7/0"]
)
def test_bad_drives_show_an_example(text):
    with pytest.raises(SlidetuneError, match="--nvme") as caught:
        parse_nvme(text)
    assert "2TB:7/5" in caught.value.hint


# --- whole machines


def test_defaults():
    profile = machine()
    assert profile.gpu == load_gpu("rtx4090")
    assert profile.host == load_host("workstation")
    assert profile.link == default_link("rtx4090")
    assert profile.nvme == preset_nvme("workstation")
    assert profile.name == "rtx4090-workstation"


def test_what_the_user_says_replaces_the_preset():
    profile = machine(
        "l4", "server", ram_gib=96, cores=6, dram_gbs=60, link="gen3x8", nvme="1TB:3/2", gpu_memory_gib=10
    )
    given_figures = {path: f for path, f in profile.figures() if f.source == "command line"}
    assert {path: f.value for path, f in given_figures.items()} == {
        "gpu.memory_gib": 10,
        "host.ram_gib": 96,
        "host.cores": 6,
        "host.dram_gbs": 60,
        "nvme.size_gb": 1000,
        "nvme.read_gbs": 3,
        "nvme.write_gbs": 2,
    }
    assert {f.kind for f in given_figures.values()} == {"given"}
    assert profile.link.name == "PCIe 3.0 x8"


def test_links_and_drives_as_objects():
    link, drive = parse_link("20"), parse_nvme("1TB:3/2")
    profile = machine(link=link, nvme=drive)
    assert (profile.link, profile.nvme) == (link, drive)
    assert machine(nvme="none").nvme is None
    assert machine(nvme=None).nvme is None


def test_the_catalog_is_not_changed_by_what_users_say():
    before = machine()
    machine(ram_gib=999, gpu_memory_gib=8, link="1")
    assert machine() == before


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"ram_gib": 0}, "--ram"),
        ({"ram_gib": -64}, "--ram"),
        ({"ram_gib": 2}, "--ram"),
        ({"ram_gib": math.nan}, "--ram"),
        ({"ram_gib": math.inf}, "--ram"),
        ({"cores": 0}, "--cores"),
        ({"cores": -1}, "--cores"),
        ({"dram_gbs": 0}, "--dram-bw"),
        ({"gpu_memory_gib": 0.5}, "--gpu-memory"),
        ({"gpu_memory_gib": 80}, "--gpu-memory"),
        ({"gpu_memory_gib": math.nan}, "--gpu-memory"),
        ({"link": "fast"}, "--link"),
        ({"nvme": "big"}, "--nvme"),
    ],
)
def test_impossible_machines_name_the_flag(arguments, flag):
    with pytest.raises(SlidetuneError) as caught:
        machine(**arguments)
    assert caught.value.message.startswith(flag)


def test_unknown_parts():
    with pytest.raises(UnknownName, match="GPU"):
        machine("rtx9999x")
    with pytest.raises(UnknownName, match="host preset"):
        machine(host="mainframe")


@pytest.mark.parametrize("gpu", DATA_SHEETS)
@pytest.mark.parametrize("host", ["desktop", "workstation", "server"])
def test_any_gpu_goes_with_any_host(gpu, host):
    profile = machine(gpu, host)
    assert all(figure.source for _, figure in profile.figures())
    assert all(figure.value > 0 or path in machines._MAY_BE_ZERO for path, figure in profile.figures())
    assert profile.capacity_bytes("gpu") > 0
    assert profile.capacity_bytes("ram") > 0


def test_guesses_are_named():
    profile = machine("rtx4090")
    lines = guessed(profile)
    assert [line.split(" = ")[0] for line in lines] == [p for p, f in profile.figures() if f.kind == "guess"]
    assert any(line.startswith("host.dram_efficiency = 0.8: ") for line in lines)
    assert [line.split(" = ")[0] for line in guessed(load_profile("h200-16c"))] == [
        "nvme.mixed_share",
        "nvme.adam_share",
    ]


# --- profiles


def test_the_shipped_h200():
    assert "h200-16c" in profile_names()
    profile = load_profile("h200-16c")
    assert profile.gpu.matmul_flops == pytest.approx(670e12, rel=0.002)
    # 6.05 G parameters/s of 26 bytes, with all 16 cores able to ask for more.
    assert profile.host.dram_bytes_per_s / 26 == pytest.approx(6.05e9, rel=0.005)
    assert 16 * profile.host.adam_gparams_per_core.value * 1e9 > profile.host.dram_bytes_per_s / 26
    assert (profile.nvme.read_gbs.value, profile.nvme.write_gbs.value) == (1.89, 3.3)
    assert profile.link == default_link("h200")


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_state_every_source(name):
    for path, figure in load_profile(name).figures():
        assert figure.source, path


def test_a_profile_from_before_a_figure_was_known_has_its_default(tmp_path):
    later = {
        "gpu": ("gap_uploads_us", "gap_downloads_us", "gap_adam_factor"),
        "host": (
            "upload_duplex_priority",
            "download_duplex_priority",
            "adam_serial_share",
            "adam_call_us",
            "gather_gbs",
            "sum_rows_gbs",
            "adam_rows_share",
        ),
    }
    fields = files.dump(machine("rtx4090"))
    for part, names in later.items():
        for name in names:
            del fields[part][name]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(fields))
    assert load_profile(tmp_path / "old.yaml") == machine("rtx4090")


@pytest.mark.parametrize("gpu", ["rtx4090", "gh200", "mi300x"])
@pytest.mark.parametrize("nvme", ["preset", "none"])
def test_profiles_round_trip(tmp_path, gpu, nvme):
    profile = machine(gpu, ram_gib=77, nvme=nvme)
    files.write(tmp_path / "mine.yaml", profile)
    assert load_profile(tmp_path / "mine.yaml") == profile
    assert load_profile(str(tmp_path / "mine.yaml")) == profile


def test_unknown_profile():
    with pytest.raises(UnknownName, match="h200-16c"):
        load_profile("h200-16")
    with pytest.raises(BadFile, match=r"nothere\.yaml: no such file"):
        load_profile("nothere.yaml")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("link.h2d_gbs", 0, "link.h2d_gbs is 0"),
        ("host.cores", -4, "host.cores is -4"),
        ("gpu.context_gib", -1, "gpu.context_gib is -1"),
        ("gpu.context_gib", 24, "leaves nothing of gpu.memory_gib"),
        ("host.process_gib", 128, "leaves nothing of host.ram_gib"),
    ],
)
def test_impossible_profiles(tmp_path, path, value, message):
    file = tmp_path / "bad.yaml"
    profile = machine()
    files.write(file, profile.replaced(path, dataclasses.replace(profile.figure(path), value=value)))
    with pytest.raises(BadFile, match=message):
        load_profile(file)


def test_no_spread_is_negative(tmp_path):
    profile = machine()
    figure = dataclasses.replace(profile.link.h2d_gbs, measured_spread=-0.1)
    files.write(tmp_path / "bad.yaml", profile.replaced("link.h2d_gbs", figure))
    with pytest.raises(BadFile, match=r"link\.h2d_gbs has a measured_spread of -0\.1"):
        load_profile(tmp_path / "bad.yaml")


def test_zero_overheads_are_possible(tmp_path):
    profile = machine().scaled("gpu.launch_us", 0).scaled("link.latency_us", 0)
    files.write(tmp_path / "ideal.yaml", profile)
    assert load_profile(tmp_path / "ideal.yaml") == profile


@pytest.mark.parametrize("cls", [Gpu, Link, Host, Nvme, HardwareProfile])
def test_profiles_have_described_schemas(cls):
    schema = files.json_schema(cls)
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {f.name for f in dataclasses.fields(cls)}


def test_another_card_in_a_profile():
    whole = load_profile("h200-16c")
    assert with_gpu(whole, "h200") == whole, "what was measured is not replaced by a data sheet"
    other = with_gpu(whole, "4090")
    assert (other.gpu.name, other.link.name) == (load_gpu("rtx4090").name, "PCIe 4.0 x16")
    assert (other.host, other.nvme, other.gpu.kernels) == (whole.host, whole.nvme, whole.gpu.kernels)
